"""Run a folder in the layout of GPTQ or AWQ with gptqmodel in transformers, in another environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.gptq import checker
from qatkit.export.interface import InputError
from qatkit.export.separate import SeparateError, SeparateProcess


class GPTQModel:
    """A process with gptqmodel, and the folder that it has loaded. Call `close` at the end.

    Args:
        python: The interpreter of an environment with gptqmodel.

    Raises:
        QatkitError: the interpreter does not start, or has no gptqmodel.
    """

    def __init__(self, python: Path) -> None:
        self._process = SeparateProcess(python, checker, "gptq", "gptqmodel")
        self.versions, self.close = self._process.versions, self._process.close

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Load a folder, and return the weights of all quantized layers by name, dequantized by gptqmodel.

        They are dequantized in float32 and, under names that end in ".float16", in float16.

        Raises:
            SeparateError: gptqmodel cannot load it.
        """
        self._process.ask(op="load", folder=str(folder.resolve()))
        return self._process.tensors(op="weights")

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """Return the logits ``[batch, tokens, vocabulary]`` of token IDs ``[batch, tokens]``.

        Raises:
            InputError: the batch has inputs other than token IDs and an attention mask.
            SeparateError: transformers cannot compute them.
        """
        if given := [name for name, value in others.items() if isinstance(value, Tensor)]:
            raise InputError(
                f"the process with gptqmodel does not accept '{given[0]}'", key="batches",
                advice="use data that is not packed",
            )  # fmt: skip
        mask = None if attention_mask is None else attention_mask.tolist()
        return self._process.tensors(op="logits", ids=input_ids.tolist(), mask=mask)["logits"]


def generate(path: Path, prompt: str, tokens: int, python: Path | None) -> Iterator[str]:
    """Generate with transformers and gptqmodel."""
    assert python is not None
    process = SeparateProcess(python, checker, "gptq", "gptqmodel")
    try:
        process.ask(op="load", folder=str(path.resolve()))
        process.ask(op="generate", folder=str(path.resolve()), prompt=prompt, tokens=tokens)
        while (piece := process.ask(op="piece")["piece"]) is not None:
            yield piece
    except SeparateError as error:
        raise QatkitError(
            f"transformers with gptqmodel failed: {error}", key=str(path),
            advice="use a shorter prompt, and a run whose data has a tokenizer",
        ) from error  # fmt: skip
    finally:
        process.close()
