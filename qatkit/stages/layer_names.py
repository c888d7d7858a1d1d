"""Layer names as a recipe writes them, and as they are inside the LightningModule that the pipeline trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

STUDENT = "model"
"""The attribute of `qatkit.pipeline.module.CompressionModule` that holds the model."""


def inside(patterns: Sequence[str]) -> list[str]:
    """Globs over the model's layers as globs over the module's."""
    return [f"{STUDENT}.{pattern}" for pattern in patterns]


def inside_keys(by_pattern: Mapping[str, T]) -> dict[str, T]:
    """The same for the keys of a mapping."""
    return {f"{STUDENT}.{pattern}": value for pattern, value in by_pattern.items()}


def outside(name: str) -> str:
    """The name of a layer of the module as the model calls it."""
    return name.removeprefix(f"{STUDENT}.")
