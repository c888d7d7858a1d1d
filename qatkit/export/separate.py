"""Run a script in the environment of another interpreter: requests and answers are lines of JSON."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qatkit.errors import QatkitError


class SeparateError(Exception):
    """An error in the other environment, or the end of its process."""


class SeparateProcess:
    """A process that answers requests; see `qatkit.export.mlx.checker`. Call `close` at the end.

    Args:
        python: The interpreter of the environment.
        script: The module whose file answers the requests. It runs without qatkit. Its first request has ``op:
            versions``, and is answered with the ``versions`` of the runtime's packages.
        format: The name of the export format, for errors.
        package: The runtime's package, for errors.

    Raises:
        QatkitError: the interpreter does not start, or has no such package.
    """

    def __init__(self, python: Path, script: ModuleType, format: str, package: str) -> None:
        advice = f"pass the interpreter of an environment made by `qatkit environment {format}`"
        self._temporary = tempfile.TemporaryDirectory()
        self._errors = Path(self._temporary.name) / "stderr.txt"
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [python, "-I", str(script.__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, encoding="utf-8",
                )  # fmt: skip
        except OSError as error:
            self._temporary.cleanup()
            raise QatkitError(f"cannot be started ({error.strerror})", key="--python", advice=advice) from error
        try:
            self.versions: dict[str, str] = self.ask(op="versions")["versions"]
        except SeparateError as error:
            self.close()
            raise QatkitError(f"cannot import {package}: {error}", key="--python", advice=advice) from error

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            SeparateError: the answer is an error, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says so
        line = self._process.stdout.readline()
        if not line:
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SeparateError(
                f"its process ended with exit code {self._process.wait()}{f': {said[-1]}' if said else ''}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SeparateError(answer["error"][:300])
        return answer

    def tensors(self, **request: Any) -> dict[str, Tensor]:
        """Return the tensors with which a request is answered: those that its ``file`` then contains.

        Raises:
            SeparateError: as in `ask`.
        """
        file = Path(self._temporary.name) / "answer.safetensors"
        self.ask(**request, file=str(file))
        return load_file(file)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._temporary.cleanup()
