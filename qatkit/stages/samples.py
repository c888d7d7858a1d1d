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
    """Refuse a model that cannot write, or not so much."""
    generator_in(model, "samples")
    check_length(model, "samples.max_new_tokens", 1 + config.max_new_tokens)


def callback(config: SamplesConfig, folder: Path) -> TextSamples:
    """What writes ``samples.jsonl`` in the stage's folder, and tells the loggers."""
    from qatkit.callbacks import TextSamples

    return TextSamples(config.every, config.prompts, folder / "samples.jsonl", config.max_new_tokens)
