"""Layer names in a recipe, and in the LightningModule that the pipeline trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

STUDENT = "model"
"""The attribute of `qatkit.pipeline.module.CompressionModule` that contains the model."""


def inside(patterns: Sequence[str]) -> list[str]:
    """Turn globs over the model's layers into globs over the LightningModule's."""
    return [f"{STUDENT}.{pattern}" for pattern in patterns]


def inside_keys(by_pattern: Mapping[str, T]) -> dict[str, T]:
    """Turn the keys of a mapping into globs over the LightningModule's layers."""
    return {f"{STUDENT}.{pattern}": value for pattern, value in by_pattern.items()}


def outside(name: str) -> str:
    """Turn the name of a layer in the LightningModule into its name in the model."""
    return name.removeprefix(f"{STUDENT}.")
