"""A small recipe, and helpers to check the message that refuses a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatkit.errors import QatkitError
from qatkit.recipe.loading import load_recipe

GOOD = """\
name: tiny
seed: 7
model:
  factory: "qatkit.models:mlp"
  args: {hidden: [8, 8]}
data: {factory: "qatkit.data:digits"}
stages:
  dense: {max_steps: 10, lr: 1e-3}
  qat:
    max_steps: 5
    distill: {temperature: 4, alpha: 0.7}
    quantize:
      weight: {num_bits: 4, strategy: channel, observer: lsq}
      activation: {num_bits: 8, symmetric: false, strategy: tensor}
export: {format: onnx}
"""


def refusal(path: Path, *overrides: str) -> str:
    """The message that refuses a recipe; it must fit on one screen."""
    with pytest.raises(QatkitError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert len(message) < 500
    return message


def assert_says(message: str, key: str, *parts: str) -> None:
    assert message.startswith(f"{key}: "), message
    for part in parts:
        assert part in message
