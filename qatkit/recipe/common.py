"""Definitions shared by multiple blocks of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker for a value that the file must provide


@dataclass(frozen=True)
class FactoryConfig:
    """A function as ``module:callable``, and its arguments."""

    factory: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)
