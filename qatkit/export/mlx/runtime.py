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
from qatkit.export.interface import InputError
from qatkit.export.mlx import checker

_ADVICE = "pass the interpreter of an environment made by `qatkit environment mlx`"


class MLXError(Exception):
    """An error of mlx-lm, or the end of its process."""


class MLXModel:
    """A process with mlx-lm, and the folder that it has loaded. Call `close` at the end.

    Args:
        python: The interpreter of an environment with mlx-lm.

    Raises:
        QatkitError: the interpreter does not start, or has no mlx-lm.
    """

    def __init__(self, python: Path) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self._errors = Path(self._temporary.name) / "stderr.txt"
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [python, "-I", checker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, encoding="utf-8",
                )  # fmt: skip
        except OSError as error:
            self._temporary.cleanup()
            raise QatkitError(f"cannot be started ({error.strerror})", key="--python", advice=_ADVICE) from error
        try:
            self.versions: dict[str, str] = self._ask(op="versions")["versions"]
        except MLXError as error:
            self.close()
            raise QatkitError(f"cannot import mlx-lm: {error}", key="--python", advice=_ADVICE) from error

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Load a folder, and return all weights by name, decoded by MLX.

        Raises:
            MLXError: mlx-lm cannot load it.
        """
        self._ask(op="load", folder=str(folder.resolve()))
        return self._tensors(op="weights")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` of token IDs ``[batch, tokens]``.

        Raises:
            InputError: the batch has padding or further inputs, which mlx-lm does not accept.
            MLXError: mlx-lm cannot compute them.
        """
        given = [name for name, value in others.items() if isinstance(value, Tensor)]
        if given:
            raise InputError(
                f"mlx-lm does not accept '{given[0]}'", key="batches", advice="use data that is not packed"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise InputError(
                "mlx-lm does not accept padded texts", key="batches", advice="use batches of texts of equal length"
            )
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
        if not line:
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise MLXError(f"its process ended with exit code {self._process.wait()}{f': {said[-1]}' if said else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MLXError(answer["error"][:300])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._temporary.cleanup()
