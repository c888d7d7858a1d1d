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


Method = Literal["magnitude", "wanda", "sparsegpt", "taylor", "movement", "srste"]
GOALS: dict[Method, tuple[str, ...]] = {
    "magnitude": ("sparsity", "ramp", "nm"),
    "wanda": ("sparsity", "nm"),
    "sparsegpt": ("sparsity", "nm"),
    "taylor": ("sparsity", "nm"),
    "movement": ("ramp",),
    "srste": ("nm",),
}
"""The keys that say how much is pruned, one of which a method takes."""
LOOKING: tuple[Method, ...] = ("wanda", "sparsegpt", "taylor")
"""The methods that look at training batches."""
EXAMPLES = {"sparsity": "sparsity: 0.5", "ramp": "ramp: {final: 0.8, start: 0.1}", "nm": "nm: [2, 4]"}


@dataclass(frozen=True)
class PruneConfig:
    """Set the weights that count least to zero and keep them there: one of `sparsity`, `ramp` and `nm`."""

    sparsity: float | None = None
    """Share of zeros, made at once before training."""
    ramp: RampConfig | None = None
    """Share of zeros that grows while training."""
    nm: list[int] | None = None
    """``[N, M]`` keeps N of every M neighbouring inputs. YAML reads an unquoted 2:4 as a number, so it is a list."""
    method: Method = "magnitude"
    """Which weights count least. ``wanda``, ``sparsegpt`` (linear layers) and ``taylor`` look at training batches and
    prune at once; ``movement`` sums up where training moves weights; ``srste`` lets N:M masks change while training."""
    block: list[int] | None = None
    """Rows and columns of the blocks that are pruned as a whole."""
    scope: Literal["layer", "model"] = "layer"
    """Every layer to this share, or the smallest weights of all layers together."""
    layers: dict[str, float] = field(default_factory=dict)
    """By glob over layer names, another share; of several that match a layer the last decides."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; every one must match a layer."""
    exclude: list[str] = field(default_factory=list)
    calibration_batches: int = 16
    """Training batches that wanda, sparsegpt and taylor look at, at least 1."""

    def __post_init__(self) -> None:
        goals = GOALS[self.method]
        given = [name for name in EXAMPLES if getattr(self, name) is not None]
        if len(given) != 1 or given[0] not in goals:
            where = given[0] if len(given) == 1 else goals[0]
            raise ValueError(
                f"{where}: {given or 'nothing'} is given with method: {self.method}; write one of "
                f"{', '.join(EXAMPLES[goal] for goal in goals)}"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity} is out of range; write a share of zeros between 0 and 1")
        if self.nm is not None and not (len(self.nm) == 2 and 0 < self.nm[0] < self.nm[1]):
            raise ValueError(f"nm: {self.nm} is no pair N < M; write [2, 4]")
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(f"block: {self.block} is no pair of sizes; write [4, 4]")
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches: {self.calibration_batches} is out of range; write a number of at least 1"
            )
        if self.method == "movement" and self.ramp is not None and (self.ramp.initial or not self.ramp.start):
            raise ValueError(
                f"ramp.start: {self.ramp.start} with initial: {self.ramp.initial} prunes before movement has scores; "
                "write start: 0.1 and initial: 0"
            )
        for glob, share in self.layers.items():
            if not 0 <= share < 1:
                raise ValueError(f"layers.{glob}: {share} is out of range; write a share of zeros from 0 to below 1")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what would be ignored."""
        plain = self.method == "magnitude" and self.nm is None
        counts = self.calibration_batches != PruneConfig.calibration_batches
        for key, value, fits, where in (
            ("calibration_batches", counts, self.method in LOOKING, f"method: {', '.join(LOOKING)}"),
            ("block", self.block, plain and self.scope == "layer", "method: magnitude by layer, without nm"),
            ("layers", self.layers, plain and self.scope == "layer", "method: magnitude by layer, without nm"),
            (
                "scope",
                self.scope == "model",
                self.method in ("magnitude", "taylor", "movement") and self.nm is None,
                "magnitude, taylor and movement, without nm",
            ),
        ):
            if value and not fits:
                raise ValueError(f"{key}: {getattr(self, key)} goes together with {where}; leave it out")

    @property
    def at_once(self) -> bool:
        """Whether all zeros are there before the first step."""
        return self.ramp is None and self.method != "srste"
