"""The ``shrink`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qatkit.common.ranges import Count, check_ranges
from qatkit.errors import QatkitError
from qatkit.pruning.methods import IMPORTANCES


@dataclass(frozen=True)
class ShrinkConfig:
    """Remove parts of the model before the stage starts training.

    A size sets how much is kept, either as an integer number of parts or as a fraction below 1.
    """

    layers: int | float | None = None
    """Number of transformer layers."""
    layers_by: Literal["score", "uniform", "last"] = "score"
    """Layers to keep: the most important layers (score), evenly spaced layers up to the last (uniform), or the last
    layers (last).
    """
    keep_layers: list[int] | None = None
    """Indices of the layers to keep, counted from 0, instead of `layers`."""
    heads: int | float | None = None
    """Number of query heads. Whole key-value groups are removed if possible; otherwise, some query heads of every group
    are removed.
    """
    kv_heads: int | float | None = None
    """Number of key-value heads, each with the query heads that use it."""
    neurons: int | float | None = None
    """Width of the MLPs."""
    hidden: int | float | None = None
    """Width of the residual stream."""
    channels: float | None = None
    """Fraction of the channels of every layer of a convolutional network except the last; coupled channels are removed
    too."""
    exclude: list[str] = field(default_factory=list)
    """Globs over the names of layers that keep all channels, used with `channels`."""
    importance: str = "activation"
    """Importance measure: a name from `qatkit.pruning.methods.IMPORTANCES`."""
    calibration_batches: Count = 8
    """Number of training batches for importance, at least 1."""

    def __post_init__(self) -> None:
        IMPORTANCES.row(self.importance, "importance")
        sizes = {key: getattr(self, key) for key in ("layers", "heads", "kv_heads", "neurons", "hidden", "channels")}
        given = [key for key, size in sizes.items() if size is not None]
        if not given and self.keep_layers is None:
            raise QatkitError("no size is set", key="layers", advice="set a size, such as neurons: 0.5")
        for key in given:
            size = sizes[key]
            if (isinstance(size, int) and size < 1) or (isinstance(size, float) and not 0 < size < 1):
                number = "" if key == "channels" else "the number to keep, or "
                raise QatkitError(f"{size} is out of range", key=key, advice=f"use {number}a fraction between 0 and 1")
        if self.layers is not None and self.keep_layers is not None:
            raise QatkitError(
                f"{self.keep_layers} and layers={self.layers} are both set",
                key="keep_layers",
                advice="remove either keep_layers or layers",
            )
        if self.layers is None and self.layers_by != "score":
            raise QatkitError(
                f"'{self.layers_by}' has no effect without layers", key="layers_by", advice="also set layers: 4"
            )
        if self.channels is not None and (len(given) > 1 or self.keep_layers is not None):
            raise QatkitError(
                "this size is supported only for convolutional networks, and the others only for transformers",
                key="channels",
                advice="set either channels or the other sizes",
            )
        if self.exclude and self.channels is None:
            raise QatkitError(f"{self.exclude} has no effect without channels", key="exclude", advice="remove exclude")
        check_ranges(self)
