"""The ``shrink`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ShrinkConfig:
    """Cut parts out of the model before the stage trains. A size is what stays: a number, or a share below 1."""

    layers: int | float | None = None
    """Blocks of a model of transformers."""
    layers_by: Literal["score", "uniform", "last"] = "score"
    """Which blocks stay: those of highest importance, spread over the model with the last one, or the last ones."""
    keep_layers: list[int] | None = None
    """Instead of `layers`: the numbers of the blocks that stay, from 0."""
    heads: int | float | None = None
    """Query heads. Whole key-value groups go where the numbers allow, else queries of every group."""
    kv_heads: int | float | None = None
    """Key-value heads, with the queries that read them."""
    neurons: int | float | None = None
    """Width of the MLPs."""
    hidden: int | float | None = None
    """Width of the residual stream."""
    channels: float | None = None
    """A share: channels of every layer of a convolutional network but the last; what depends on one goes with it."""
    exclude: list[str] = field(default_factory=list)
    """With `channels`: globs over layers that keep theirs."""
    importance: Literal["activation", "magnitude", "taylor"] = "activation"
    """What decides which parts stay: what passes through them, their weights, or what the loss owes them."""
    calibration_batches: int = 8
    """Training batches for importance, at least 1."""

    def __post_init__(self) -> None:
        sizes = {key: getattr(self, key) for key in ("layers", "heads", "kv_heads", "neurons", "hidden", "channels")}
        given = [key for key, size in sizes.items() if size is not None]
        if not given and self.keep_layers is None:
            raise ValueError("layers: nothing is given to shrink to; write a size, such as neurons: 0.5")
        for key in given:
            size = sizes[key]
            if (isinstance(size, int) and size < 1) or (isinstance(size, float) and not 0 < size < 1):
                number = "" if key == "channels" else "how many stay, or "
                raise ValueError(f"{key}: {size} is out of range; write {number}a share between 0 and 1")
        if self.layers is not None and self.keep_layers is not None:
            raise ValueError(f"keep_layers: {self.keep_layers} and layers: {self.layers} are given; write one of them")
        if self.layers is None and self.layers_by != "score":
            raise ValueError(f"layers_by: '{self.layers_by}' goes with layers; write layers: 4 beside it")
        if self.channels is not None and (len(given) > 1 or self.keep_layers is not None):
            raise ValueError("channels: it is for convolutional networks, the other sizes are not; write one kind")
        if self.exclude and self.channels is None:
            raise ValueError(f"exclude: {self.exclude} goes with channels; leave it out")
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches: {self.calibration_batches} is out of range; write a number of at least 1"
            )
