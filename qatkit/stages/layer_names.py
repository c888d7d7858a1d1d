"""Layer names in a recipe, and in the LightningModule that the pipeline trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

STUDENT = "model"
"""The attribute of `qatkit.pipeline.module.CompressionModule` that contains the model."""


def inside(patterns: Sequence[str]) -> list[str]:
    """Convert globs over the model's layers to globs over the LightningModule's layers."""
    return [f"{STUDENT}.{pattern}" for pattern in patterns]


def inside_keys(by_pattern: Mapping[str, T]) -> dict[str, T]:
    """Convert the keys of a mapping to globs over the LightningModule's layers."""
    return {f"{STUDENT}.{pattern}": value for pattern, value in by_pattern.items()}


def outside(name: str) -> str:
    """Convert the name of a layer in the LightningModule to its name in the model."""
    return name.removeprefix(f"{STUDENT}.")
