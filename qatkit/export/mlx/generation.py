"""Generate text from an MLX folder with mlx-lm, in the environment of another interpreter."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qatkit.errors import QatkitError
from qatkit.export.mlx import generator


def in_mlx(path: Path, prompt: str, tokens: int, python: Path | None) -> Iterator[str]:
    """Generate with mlx-lm."""
    assert python is not None
    command = [str(python), "-I", generator.__file__, str(path.resolve()), prompt, str(tokens)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise QatkitError(
            f"cannot be started ({error.strerror})", key="--python", advice="pass the interpreter of an environment"
        ) from error
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            yield json.loads(line)
        lines = process.stderr.read().strip().splitlines()
    if process.returncode:
        raise QatkitError(
            f"mlx-lm failed: {lines[-1] if lines else f'exit code {process.returncode}'}", key="--python",
            advice="pass the interpreter of an environment made by `qatkit environment mlx`",
        )  # fmt: skip
