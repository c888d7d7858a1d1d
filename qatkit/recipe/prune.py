"""The ``prune`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from qatkit.common.ranges import Count, Fraction, ProperFraction, Range, check_ranges
from qatkit.errors import QatkitError
from qatkit.pruning.methods import METHODS, TARGETS, PruningMethod
from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class RampConfig:
    """The sparsity schedule of a stage (Zhu & Gupta, 2017); its start and end are fractions of the stage."""

    final: ProperFraction = MISSING
    """Fraction of pruned weights at the end."""
    start: Fraction = 0.0
    end: Fraction = 0.5
    initial: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    power: Annotated[float, Range(0.0, 100.0, above=True, example="3")] = 3.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0 <= self.start < self.end <= 1:
            raise QatkitError(
                f"{self.end} is not after start={self.start}",
                key="end",
                advice="use fractions of the stage with 0 <= start < end <= 1",
            )


EXAMPLES = {"sparsity": "sparsity: 0.5", "ramp": "ramp: {final: 0.8, start: 0.1}", "nm": "nm: [2, 4]"}
"""A valid value of each key in `TARGETS`, for errors."""


@dataclass(frozen=True)
class PruneConfig:
    """Prune the least important weights and keep them at zero. Set exactly one of `sparsity`, `ramp` and `nm`."""

    sparsity: ProperFraction | None = None
    """Fraction of weights to prune in one step, before training."""
    ramp: RampConfig | None = None
    """Sparsity schedule that rises during training."""
    nm: list[int] | None = None
    """``[N, M]`` keeps N of every M consecutive inputs. Use a list, because YAML reads an unquoted 2:4 as a number."""
    method: str = "magnitude"
    """Pruning method: a name from `qatkit.pruning.methods.METHODS`."""
    block: list[int] | None = None
    """Size of the blocks that are pruned as a whole, in rows and columns."""
    scope: Literal["layer", "model"] = "layer"
    """Prune every layer to the same sparsity, or rank the weights of all layers together."""
    layers: dict[str, float] = field(default_factory=dict)
    """Sparsity by glob over layer names, which overrides `sparsity`; the last matching glob wins."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over layer names; each must match a layer."""
    exclude: list[str] = field(default_factory=list)
    calibration_batches: Count = 16
    """Number of training batches for methods that calibrate, at least 1."""

    def __post_init__(self) -> None:
        targets = METHODS.row(self.method, "method").targets
        given = [key for key in TARGETS if getattr(self, key) is not None]
        if len(given) != 1 or given[0] not in targets:
            wanted = targets[0] if len(targets) == 1 else f"exactly one of {', '.join(targets)}"
            raise QatkitError(
                f"method {self.method} needs {wanted}, got {' and '.join(given) or 'none'}",
                key=given[0] if len(given) == 1 else targets[0],
                advice=f"use {' or '.join(EXAMPLES[key] for key in targets)}",
            )
        check_ranges(self)
        if self.nm is not None and not (len(self.nm) == 2 and 0 < self.nm[0] < self.nm[1]):
            raise QatkitError(
                f"{self.nm} is not a pair N, M with 0 < N < M", key="nm", advice="use a pair such as [2, 4]"
            )
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise QatkitError(
                f"{self.block} is not a pair of sizes", key="block", advice="use [rows, columns], such as [4, 4]"
            )
        if self.method == "movement" and self.ramp is not None and (self.ramp.initial or not self.ramp.start):
            raise QatkitError(
                f"start={self.ramp.start} with initial={self.ramp.initial} prunes before movement scores exist",
                key="ramp.start",
                advice="use start: 0.1 and initial: 0",
            )
        for glob, sparsity in self.layers.items():
            if not 0 <= sparsity < 1:
                raise QatkitError(
                    f"{sparsity} is out of range", key=f"layers['{glob}']", advice="use a non-negative fraction below 1"
                )
        self._check_unused_keys()

    def _check_unused_keys(self) -> None:
        """Reject keys that the method or the pattern would ignore."""
        defaults = {spec.name: spec.default for spec in fields(self)} | {"layers": {}}
        for key in ("calibration_batches", "scope", "block", "layers"):
            value = getattr(self, key)
            if value == defaults[key]:
                continue
            reason = ""
            if key not in self.row.keys:
                methods = ", ".join(row.name for row in METHODS.values() if key in row.keys)
                reason = f"method {self.method} does not support it; only {methods} do"
            elif self.nm is not None and key != "calibration_batches":
                reason = "an N:M pattern does not support it"
            elif self.scope == "model" and key in ("block", "layers"):
                reason = "scope: model does not support it"
            if reason:
                raise QatkitError(f"{value} has no effect, because {reason}", key=key, advice=f"remove {key}")

    def check_sharding(self) -> None:
        """Raise an error for a method that does not support weights sharded by FSDP2."""
        if not self.row.sharded:
            others = ", ".join(row.name for row in METHODS.values() if row.sharded)
            raise QatkitError(
                f"'{self.method}' requires unsharded weights, but fsdp2 shards them",
                key="method",
                advice=f"use one of {others}, or set trainer.strategy: ddp",
            )

    @property
    def row(self) -> PruningMethod:
        """The method's row in its table."""
        return METHODS[self.method]

    @property
    def at_once(self) -> bool:
        """Whether all pruned weights are zero before the first step."""
        return self.ramp is None and not self.row.moves_mask
