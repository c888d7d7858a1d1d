"""The ``prune`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class RampConfig:
    """How sparsity grows with the progress of a stage (Zhu & Gupta, 2017); times are shares of the stage."""

    final: float = MISSING
    """Share of zeros at the end."""
    start: float = 0.0
    end: float = 0.5
    initial: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        if self.final != MISSING and not 0 < self.final < 1:
            raise ValueError(f"final: {self.final} is out of range; write a share of zeros between 0 and 1")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"end: {self.end} is not after start: {self.start}; write 0 <= start < end <= 1")


@dataclass(frozen=True)
class PruneConfig:
    """Set the smallest weights to zero and keep them there: one of `sparsity`, `ramp` and `nm`."""

    sparsity: float | None = None
    """Share of zeros, made at once before training."""
    ramp: RampConfig | None = None
    """Share of zeros that grows while training."""
    nm: list[int] | None = None
    """``[N, M]`` keeps N of every M neighbouring inputs. YAML reads an unquoted 2:4 as a number, so it is a list."""
    block: list[int] | None = None
    """Rows and columns of the blocks that are pruned as a whole."""
    scope: Literal["layer", "model"] = "layer"
    """Every layer to this share, or the smallest weights of all layers together."""
    layers: dict[str, float] = field(default_factory=dict)
    """By glob over layer names, another share; of several that match a layer the last decides."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = [name for name in ("sparsity", "ramp", "nm") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"sparsity: {given or 'nothing'} is given; write one of sparsity: 0.5, ramp and nm: [2, 4]"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity} is out of range; write a share of zeros between 0 and 1")
        if self.nm is not None and not (len(self.nm) == 2 and 0 < self.nm[0] < self.nm[1]):
            raise ValueError(f"nm: {self.nm} is no pair N < M; write [2, 4]")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(f"block: {self.block} is no pair of sizes; write [4, 4]")
