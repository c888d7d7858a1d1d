"""What a quantization is, as plain data: no torch, nothing but the standard library.

A recipe, a fake quantizer, an exporter and a verifier all read the same :class:`QuantSpec`, so that none of them can
hold another opinion about ranges, granularity or rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["tensor", "channel", "group", "token"]
Observer = Literal["minmax", "mse", "lsq"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized, in the vocabulary of compressed-tensors.

    Symmetric codes are signed, in ``[-2**(b-1), 2**(b-1) - 1]``, zero point 0, scale ``absmax / (2**(b-1) - 1)``.
    Asymmetric codes are unsigned, in ``[0, 2**b - 1]``; their range always holds zero, so zero stays exactly zero.

    Raises:
        ValueError: a field is out of range or does not fit the others.

    Example:
        >>> QuantSpec(num_bits=4, strategy="group", group_size=32).qmax
        7
    """

    num_bits: int = 8
    """Bits of a code, 2 to 8."""
    symmetric: bool = True
    """Signed codes around zero (True), or unsigned codes with a zero point (False)."""
    strategy: Strategy = "channel"
    """What shares one scale: the tensor, an output channel, a group of inputs, or (activations) a token."""
    group_size: int | None = None
    """Inputs per scale; for ``strategy: group`` only."""
    observer: Observer = "minmax"
    """Where the scale comes from: the range, the least squared error over clipped ranges, or learned (LSQ)."""
    scale_dtype: ScaleDtype = "float32"
    """The dtype that scales are rounded to, in training as in the exported file."""

    def __post_init__(self) -> None:
        if type(self.num_bits) is not int:
            raise ValueError(f"num_bits: {self.num_bits!r} is no whole number; write one from 2 to 8")
        for name, kind in (("strategy", Strategy), ("observer", Observer), ("scale_dtype", ScaleDtype)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}: {value!r} is unknown; write one of {', '.join(get_args(kind))}")
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits: {self.num_bits} is out of range; write 2 to 8")
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise ValueError(
                f"group_size: strategy 'group' needs a size of at least 1, not {self.group_size}; write 32"
            )
        if self.strategy != "group" and self.group_size is not None:
            raise ValueError(
                f"group_size: {self.group_size} has no meaning with strategy '{self.strategy}'; "
                "write strategy: group, or leave group_size out"
            )
        if self.strategy == "token" and self.observer != "minmax":
            raise ValueError(
                f"observer: '{self.observer}' cannot be used with strategy 'token', whose scales are computed "
                "from each token as it comes; write observer: minmax"
            )

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.num_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.num_bits - 1)) - 1 if self.symmetric else (1 << self.num_bits) - 1

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from the tensor itself at run time."""
        return self.strategy == "token"
