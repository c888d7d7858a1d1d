"""The ``samples`` block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qatkit.distillation.generation import check_length, generator_in
from qatkit.recipe import SamplesConfig

if TYPE_CHECKING:
    from qatkit.callbacks import TextSamples


def check(config: SamplesConfig, model: nn.Module) -> None:
    """Raise an error if the model cannot generate text of the required length.

    Raises:
        QatkitError: the model is not a transformers causal language model, or its maximum sequence length is too small.
    """
    generator_in(model, "samples")
    check_length(model, "samples.max_new_tokens", 1 + config.max_new_tokens)


def callback(config: SamplesConfig, folder: Path) -> TextSamples:
    """Return the callback that writes ``samples.jsonl`` to the stage's folder and to the loggers."""
    from qatkit.callbacks import TextSamples

    return TextSamples(config.every, config.prompts, folder / "samples.jsonl", config.max_new_tokens)
