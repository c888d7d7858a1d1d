"""Run an MLX folder with mlx-lm, in the environment of another interpreter."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.mlx import checker


class MLXModel:
    """A folder that mlx-lm has loaded in another process.

    Args:
        python: The interpreter of an environment with mlx-lm.
        folder: The folder.

    Raises:
        QatkitError: the interpreter does not start, or mlx-lm cannot load the folder.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        try:
            self._process = subprocess.Popen(
                [python, "-I", checker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        except OSError as error:
            raise QatkitError(
                f"cannot be started ({error.strerror})", key="--python", advice="pass the interpreter of an environment"
            ) from error
        self.versions: dict[str, str] = self._ask(op="load", folder=str(folder.resolve()))["versions"]

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name, decoded by MLX."""
        return self._tensors(op="weights")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` of token IDs ``[batch, tokens]``.

        Raises:
            QatkitError: the batch has padding or further inputs, which mlx-lm does not accept.
        """
        given = [name for name, value in others.items() if isinstance(value, Tensor)]
        if given:
            raise QatkitError(f"mlx-lm does not accept '{given[0]}'", advice="use data that is not packed")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise QatkitError("mlx-lm does not accept padded batches", advice="use texts of equal length")
        return self._tensors(op="logits", ids=input_ids.tolist())["logits"]

    def _tensors(self, **request: Any) -> dict[str, Tensor]:
        file = Path(self._temporary.name) / "answer.safetensors"
        self._ask(**request, file=str(file))
        return load_file(file)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says so
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"exit code {self._process.wait()}"}
        if "error" in answer:
            raise QatkitError(
                f"mlx-lm failed: {answer['error'][:300]}", key="--python",
                advice="pass the interpreter of an environment made by `qatkit environment mlx`",
            )  # fmt: skip
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._temporary.cleanup()
