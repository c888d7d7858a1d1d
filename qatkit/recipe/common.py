"""What several blocks of a recipe share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"  # OmegaConf's mark of a value that the file must give


@dataclass(frozen=True)
class FactoryConfig:
    """A function named as ``module:callable``, and the arguments it is called with."""

    factory: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)
