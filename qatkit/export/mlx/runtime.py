"""Run an MLX folder with mlx-lm, in the environment of another interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from qatkit.export.interface import InputError
from qatkit.export.mlx import checker
from qatkit.export.separate import SeparateProcess


class MLXModel:
    """A process with mlx-lm, and the folder that it has loaded. Call `close` at the end.

    Args:
        python: The interpreter of an environment with mlx-lm.

    Raises:
        QatkitError: the interpreter does not start, or has no mlx-lm.
    """

    def __init__(self, python: Path) -> None:
        self._process = SeparateProcess(python, checker, "mlx", "mlx-lm")
        self.versions, self.close = self._process.versions, self._process.close

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Load a folder, and return all weights by name, decoded by MLX.

        Raises:
            SeparateError: mlx-lm cannot load it.
        """
        self._process.ask(op="load", folder=str(folder.resolve()))
        return self._process.tensors(op="weights")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` of token IDs ``[batch, tokens]``.

        Raises:
            InputError: the batch has padding or further inputs, which mlx-lm does not accept.
            SeparateError: mlx-lm cannot compute them.
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
        return self._process.tensors(op="logits", ids=input_ids.tolist())["logits"]
