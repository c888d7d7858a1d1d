"""Records of a sensitivity measurement: size and loss of every format for each layer group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qatkit.errors import QatkitError
from qatkit.quantization.scale_dtypes import SCALE_DTYPES
from qatkit.quantization.slices import outer_shape, scale_shape
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec


def stored_bytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Compute the bytes of a quantized weight: packed codes, scales and zero points.

    Codes and zero points are packed without gaps; scales are stored in their dtype, and minima like
    scales. Outer scales have 32 bits per tensor, and 16 bits per super-block. The header and alignment of a file are
    not included.

    Args:
        shape: Shape of the weight, ``[out, in, ...]``.
        spec: Its quantization.

    Example:
        >>> from qatkit import scheme
        >>> stored_bytes([1, 32], scheme("Q4_0").weight), stored_bytes([1, 256], scheme("Q4_K").weight)
        (18, 144)
    """
    own = scale_shape(shape, spec)
    scales, bits = math.prod(own) if spec.element.scaled else 0, SCALE_DTYPES[spec.scale_dtype].bits
    codes = math.ceil(math.prod(shape) * spec.stored_bits / 8)
    zero_points = 0 if spec.symmetric else math.ceil(scales * (bits if spec.has_minimum else spec.num_bits) / 8)
    outer = math.prod(outer_shape(own, spec)) * (2 if spec.super_blocks else 4) if spec.two_level else 0
    return codes + zero_points + math.ceil(scales * bits / 8) + outer


@dataclass(frozen=True)
class Option:
    """Size and loss increase of one format for a group of layers."""

    bytes: int
    increase: float
    """The loss with only this group quantized minus the loss of the plain model, which can be negative due to noise."""

    @property
    def cost(self) -> float:
        """The increase used for allocation; negative increases are noise and are treated as 0."""
        return max(self.increase, 0.0)


@dataclass(frozen=True)
class Group:
    """Layers that must have the same format."""

    layers: tuple[str, ...]
    weights: int
    """Number of weights; tied weights are counted once."""
    options: dict[str, Option]
    """Options by candidate, without candidates that cannot be applied to the layers."""

    @property
    def name(self) -> str:
        """The layers' names."""
        return " + ".join(self.layers)


@dataclass(frozen=True)
class Sensitivity:
    """Size and loss of each format for each group of layers, from `measure_sensitivity`."""

    loss: float
    """Loss of the plain model."""
    candidates: dict[str, Scheme]
    groups: tuple[Group, ...]
    others: tuple[str, ...] = ()
    """Names of the model's other modules with parameters, which globs over layer names must not match."""
    left_out: tuple[str, ...] = ()
    """One sentence for every candidate that cannot be applied to a group."""

    @property
    def weights(self) -> int:
        """Number of weights in all groups."""
        return sum(group.weights for group in self.groups)

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for `from_plain`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, content: Any) -> Sensitivity:
        """Create the record from the data returned by `to_plain`, which may have been stored as JSON.

        Raises:
            QatkitError: The data has an unexpected structure.
        """
        try:
            return cls(
                loss=float(content["loss"]),
                candidates={
                    name: Scheme(**{side: QuantSpec(**spec) for side, spec in how.items() if spec is not None})
                    for name, how in content["candidates"].items()
                },
                groups=tuple(
                    Group(
                        layers=tuple(group["layers"]),
                        weights=int(group["weights"]),
                        options={name: Option(**option) for name, option in group["options"].items()},
                    )
                    for group in content["groups"]
                ),
                others=tuple(content["others"]),
                left_out=tuple(content["left_out"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise QatkitError(
                f"the file was not written by `qatkit sensitivity` ({type(error).__name__}: {error})",
                key="sensitivity",
                advice="measure again",
            ) from None  # fmt: skip
