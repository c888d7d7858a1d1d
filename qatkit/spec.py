"""What a quantization is, as plain data: no torch, nothing but the standard library.

A recipe, a fake quantizer, an exporter and a verifier all read the same :class:`QuantSpec`, so that none of them can
hold another opinion about ranges, granularity or rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ElementType = Literal["int", "ternary", "float", "float_e5m2"]
Strategy = Literal["tensor", "channel", "group", "block", "token"]
Observer = Literal["minmax", "absmean", "mse", "moving_average", "percentile", "kl", "lsq", "lsq_plus"]
ScaleDtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"]
ScaleRule = Literal["qmax", "range", "signed"]

# floating-point elements of 4, 6 and 8 bits: exponent bits, mantissa bits, largest value (OCP: no infinities but e5m2)
FLOATS: dict[tuple[str, int], tuple[int, int, float]] = {
    ("float", 4): (2, 1, 6.0),
    ("float", 6): (2, 3, 7.5),
    ("float", 8): (4, 3, 448.0),
    ("float_e5m2", 8): (5, 2, 57344.0),
}


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized, in the vocabulary of compressed-tensors.

    Symmetric whole numbers are signed, in ``[-2**(b-1), 2**(b-1) - 1]``, zero point 0. Asymmetric ones are unsigned,
    in ``[0, 2**b - 1]``; their range always holds zero, so zero stays exactly zero. Ternary codes are -1, 0 and 1.

    Raises:
        ValueError: a field is out of range or does not fit the others.

    Example:
        >>> QuantSpec(num_bits=4, strategy="group", group_size=32).qmax
        7
    """

    num_bits: int = 8
    """Bits of a code: 2 to 8 for int, 2 for ternary, 4, 6 or 8 for float."""
    symmetric: bool = True
    """Signed codes around zero (True), or unsigned whole numbers with a zero point (False)."""
    strategy: Strategy = "channel"
    """What shares one scale: the tensor, an output channel, a group of inputs, a block of outputs and inputs, or
    (activations) a token."""
    group_size: int | None = None
    """Inputs per scale; for ``strategy: group`` only. Activations in groups are scaled as they come, like tokens."""
    observer: Observer = "minmax"
    """Where the scale comes from: the range (minmax); the mean magnitude (absmean, ternary weights); the least squared
    error over clipped ranges (mse); over calibration, the mean range of the batches (moving_average), a percentile, or
    the least KL divergence (kl); or learned, alone (lsq) or with the zero point (lsq_plus)."""
    scale_dtype: ScaleDtype = "float32"
    """The dtype that scales are rounded to, in training as in the exported file. float8_e8m0fnu are powers of two (the
    MX formats); float8_e4m3fn come under one float32 scale of the whole tensor (NVFP4)."""
    type: ElementType = "int"
    """What a code is: a whole number, one of -1, 0, 1, or a small float (e2m1, e2m3 and e4m3 by bits; or e5m2)."""
    block_structure: tuple[int, int] | None = None
    """Outputs and inputs per scale; for ``strategy: block`` only."""
    percentile: float = 99.99
    """Percent of the values that ``observer: percentile`` keeps inside the range."""
    scale_rule: ScaleRule = "qmax"
    """What the largest magnitude is divided by: the largest code (127, qmax); half the range of codes (127.5,
    compressed-tensors); or, with its sign, the smallest code (-8, GGUF's Q4_0)."""

    def __post_init__(self) -> None:
        if type(self.num_bits) is not int:
            raise ValueError(f"num_bits: {self.num_bits!r} is no whole number; write one from 2 to 8")
        if type(self.symmetric) is not bool:
            raise ValueError(f"symmetric: {self.symmetric!r} is neither True nor False; write one of them")
        if self.group_size is not None and type(self.group_size) is not int:
            raise ValueError(f"group_size: {self.group_size!r} is no whole number; write one such as 32")
        for name, kind in (
            ("type", ElementType), ("strategy", Strategy), ("observer", Observer), ("scale_dtype", ScaleDtype),
            ("scale_rule", ScaleRule),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name}: {value!r} is unknown; write one of {', '.join(get_args(kind))}")
        if self.block_structure is not None:
            object.__setattr__(self, "block_structure", tuple(self.block_structure))  # a list, from YAML or JSON
        self._check_bits()
        self._check_slices()
        self._check_scale()

    def _check_bits(self) -> None:
        bits = {"int": range(2, 9), "ternary": [2]}.get(self.type, sorted(b for t, b in FLOATS if t == self.type))
        if self.num_bits not in bits:
            known = "2 to 8" if self.type == "int" else " or ".join(str(b) for b in bits)
            of = "" if self.type == "int" else f" for type '{self.type}'"
            raise ValueError(f"num_bits: {self.num_bits} is out of range{of}; write {known}")
        if self.type != "int" and not self.symmetric:
            raise ValueError(f"symmetric: false is for whole numbers, not for type '{self.type}'; leave it out")

    def _check_slices(self) -> None:
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise ValueError(
                f"group_size: strategy 'group' needs a size of at least 1, not {self.group_size}; write 32"
            )
        block = self.block_structure
        if self.strategy == "block" and (block is None or len(block) != 2 or min(block) < 1):
            raise ValueError(f"block_structure: strategy 'block' needs two sizes, not {block}; write [128, 128]")
        for name, owner in (("group_size", "group"), ("block_structure", "block")):
            if self.strategy != owner and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: {getattr(self, name)} has no meaning with strategy '{self.strategy}'; "
                    f"write strategy: {owner}, or leave {name} out"
                )
        if self.strategy == "token" and self.observer != "minmax":
            raise ValueError(
                f"observer: '{self.observer}' cannot be used with strategy 'token', whose scales are computed "
                "from each token as it comes; write observer: minmax"
            )

    def _check_scale(self) -> None:
        if self.type == "ternary" and self.observer not in ("absmean", "mse", "lsq"):
            raise ValueError(f"observer: '{self.observer}' is not for type 'ternary'; write absmean, mse or lsq")
        if self.observer == "absmean" and self.type != "ternary":
            raise ValueError(f"observer: 'absmean' is for type 'ternary', not for '{self.type}'; write minmax or mse")
        if self.observer == "lsq_plus" and self.symmetric:
            raise ValueError("observer: 'lsq_plus' learns a zero point; write symmetric: false, or observer: lsq")
        if self.percentile != 99.99 and self.observer != "percentile":
            raise ValueError(
                f"percentile: {self.percentile} has no meaning with observer '{self.observer}'; leave it out"
            )
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile: {self.percentile} is out of range; write more than 50, at most 100")
        if self.scale_rule != "qmax" and (not self.symmetric or self.type != "int"):
            raise ValueError(f"scale_rule: '{self.scale_rule}' is for symmetric whole numbers; leave it out")
        if self.scale_dtype.startswith("float8") and (self.strategy != "group" or not self.is_float):
            raise ValueError(
                f"scale_dtype: '{self.scale_dtype}' is for floats in groups (MX formats, NVFP4); write type: float and "
                "strategy: group, or scale_dtype: float16"
            )

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats."""
        return self.type in ("float", "float_e5m2")

    @property
    def qmin(self) -> int | float:
        """The smallest code."""
        if self.type == "int":
            return -(1 << (self.num_bits - 1)) if self.symmetric else 0
        return -self.qmax

    @property
    def qmax(self) -> int | float:
        """The largest code."""
        if self.is_float:
            return FLOATS[self.type, self.num_bits][2]
        if self.type == "ternary":
            return 1
        return (1 << (self.num_bits - 1)) - 1 if self.symmetric else (1 << self.num_bits) - 1

    @property
    def learned(self) -> bool:
        """Whether the scale is a Parameter."""
        return self.observer in ("lsq", "lsq_plus")

    @property
    def two_level(self) -> bool:
        """Whether scales are small floats under one float32 scale of the whole tensor (NVFP4)."""
        return self.scale_dtype == "float8_e4m3fn"
