"""The quantization of one tensor as plain data, without importing torch.

A recipe, a fake quantizer, an exporter and a verifier all read the same :class:`QuantSpec`, so they agree on ranges,
granularity and rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qatkit.common.ranges import INT32
from qatkit.errors import QatkitError, did_you_mean
from qatkit.quantization.elements import ELEMENTS, FLOAT_FORMATS, Element
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.scale_dtypes import SCALE_DTYPES, SUPER_BLOCK

Strategy = Literal["tensor", "channel", "group", "block", "token"]
ScaleRule = Literal["qmax", "range", "signed", "minimum"]


@dataclass(frozen=True)
class QuantSpec:
    """The quantization of one tensor, in the terms of compressed-tensors.

    Symmetric integers are signed, in ``[-2**(b-1), 2**(b-1) - 1]``, with zero point 0. Asymmetric integers are
    unsigned, in ``[0, 2**b - 1]``; their range always includes zero, so zero is represented exactly (except with
    integer scales, which have minima instead of zero points). Ternary codes are -1, 0 and 1.

    Raises:
        QatkitError: A field is out of range or conflicts with another field.

    Example:
        >>> QuantSpec(num_bits=4, strategy="group", group_size=32).qmax
        7
    """

    num_bits: int = 8
    """Bits per code: 2 to 8 for int, 4 for nonlinear, 16 for float16, and 4, 6 or 8 for float. Ternary codes take 2; 1
    stands for the same three values in five codes per byte, as in GGUF's TQ1_0.
    """
    symmetric: bool = True
    """Use signed codes around zero (True), or unsigned integers with a zero point or a minimum (False)."""
    strategy: Strategy = "channel"
    """Granularity of the scales: per tensor, per output channel, per group of inputs, per block of outputs and inputs,
    or (for activations) per token.
    """
    group_size: int | None = None
    """Inputs per scale, only for ``strategy: group``. Per-group scales of activations are dynamic, like per-token
    scales.
    """
    observer: str = "minmax"
    """Method that chooses the scale. minmax uses the range, absmean (ternary weights) the mean magnitude, and mse the
    clipped range with the smallest squared error. From calibration batches, moving_average uses the mean range,
    percentile a percentile, and kl the range with the smallest KL divergence. lsq learns the scale, and lsq_plus also
    learns the zero point.
    """
    scale_dtype: str = "float32"
    """The dtype to which scales are rounded, both in training and in the exported file. float8_e8m0fnu scales are
    powers of two (MX formats); float8_e4m3fn scales are combined with one float32 scale per tensor (NVFP4), ue4m3
    scales are the same numbers without it (NVFP4 in GGUF and MLX). float16_late scales compute the codes in float32,
    and decode them in float16, as llama.cpp quantizes activations; with weights that have ``scale_rule: minimum``, the
    sums of the inputs of a group are then rounded to float16 as well. Integer
    scales (int6, int8, and uint4 or uint6 with ``symmetric: false``) are combined with one float16 scale per
    super-block of 256 inputs (GGUF's K-quants). A second such pair then gives every group a minimum instead of a zero
    point.
    """
    type: str = "int"
    """Element type of a code: int, ternary (-1, 0, 1), nonlinear (the values of GGUF's IQ4_NL), float16 (without a
    scale), float (e2m1, e2m3 or e4m3, by number of bits) or float_e5m2.
    """
    block_structure: tuple[int, int] | None = None
    """Outputs and inputs per scale, only for ``strategy: block``."""
    percentile: float = 99.99
    """Percentage of the values that ``observer: percentile`` keeps inside the range."""
    scale_rule: ScaleRule = "qmax"
    """Divisor of the largest magnitude: the largest code (qmax, 127 with 8 bits); half the range of codes (range,
    127.5, as in compressed-tensors); or the smallest code, for the largest magnitude with its sign (signed, -8 with 4
    bits, as in GGUF's Q4_0). With a zero point, the range is divided by the largest code; minimum also rounds the scale
    so that scale times zero point is a float16 number, which GGUF's Q4_1 stores instead of the zero point.
    """
    dynamic: bool = False
    """Compute the scale of an activation with ``strategy: tensor`` from each batch instead of calibrating it, as in
    ONNX Runtime's DynamicQuantizeLinear. Per-token and per-group scales are always computed.
    """

    def __post_init__(self) -> None:
        if type(self.num_bits) is not int:
            raise QatkitError(
                f"{self.num_bits!r} is not an integer", key="num_bits", advice="use an integer from 2 to 8"
            )
        for name in ("symmetric", "dynamic"):
            if type(value := getattr(self, name)) is not bool:
                raise QatkitError(f"{value!r} is not a boolean", key=name, advice="use true or false")
        if self.group_size is not None and type(self.group_size) is not int:
            raise QatkitError(
                f"{self.group_size!r} is not an integer", key="group_size", advice="use an integer such as 32"
            )
        ELEMENTS.row(str(self.type), "type")
        OBSERVERS.row(str(self.observer), "observer")
        SCALE_DTYPES.row(str(self.scale_dtype), "scale_dtype")
        for name, kind in (("strategy", Strategy), ("scale_rule", ScaleRule)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise QatkitError(
                    f"unknown {name} {value!r}", key=name, advice=did_you_mean(str(value), get_args(kind))
                )
        if self.block_structure is not None:
            object.__setattr__(self, "block_structure", tuple(self.block_structure))  # a list, from YAML or JSON
        self._check_bits()
        self._check_slices()
        self._check_observer()
        self._check_scale()

    def _check_bits(self) -> None:
        bits = self.element.bits
        if self.num_bits not in bits:
            raise QatkitError(
                f"{self.num_bits} is out of range for type '{self.type}'", key="num_bits", advice=f"use {_choice(bits)}"
            )
        if not self.element.asymmetric and not self.symmetric:
            raise QatkitError(
                f"false is not supported for type '{self.type}', which has no zero point", key="symmetric",
                advice="remove symmetric",
            )  # fmt: skip

    def _check_slices(self) -> None:
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise QatkitError(
                f"strategy 'group' requires a positive integer, not {self.group_size}", key="group_size",
                advice="use 32",
            )  # fmt: skip
        block = self.block_structure
        if self.strategy == "block" and (block is None or len(block) != 2 or min(block) < 1):
            raise QatkitError(
                f"strategy 'block' requires two sizes, not {block}", key="block_structure", advice="use [128, 128]"
            )
        for name, size in (("group_size", self.group_size or 0), ("block_structure", max(block or [0]))):
            if size > INT32:
                raise QatkitError(
                    f"{size} is out of range", key=name, advice=f"use an integer of at most {INT32}"
                )  # fmt: skip
        for name, owner in (("group_size", "group"), ("block_structure", "block")):
            if self.strategy != owner and getattr(self, name) is not None:
                raise QatkitError(
                    f"{getattr(self, name)} has no effect with strategy '{self.strategy}'", key=name,
                    advice=f"set strategy: {owner}, or remove {name}",
                )  # fmt: skip

    def _check_observer(self) -> None:
        row = OBSERVERS[self.observer]
        fitting = self.element.observers or tuple(
            name
            for name, known in OBSERVERS.items()
            if known.general and (self.element.asymmetric or not known.learned_offset)
        )
        if self.dynamic and not row.dynamic:
            raise QatkitError(
                f"'{self.observer}' is not supported with dynamic: true, which computes scales from each batch",
                key="observer", advice="use minmax, or remove dynamic",
            )  # fmt: skip
        if self.strategy == "token" and not row.dynamic:
            raise QatkitError(
                f"'{self.observer}' is not supported with strategy 'token', whose scales are computed per token",
                key="observer", advice="use minmax",
            )  # fmt: skip
        if row.learned_offset and self.symmetric:
            raise QatkitError(
                f"'{self.observer}' learns a zero point, which symmetric codes do not have", key="observer",
                advice="set symmetric: false, or use lsq",
            )  # fmt: skip
        if self.observer not in fitting:
            raise QatkitError(
                f"'{self.observer}' is not supported for type '{self.type}'", key="observer",
                advice=f"use {_choice(fitting)}",
            )  # fmt: skip
        if self.percentile != 99.99 and self.observer != "percentile":
            raise QatkitError(
                f"{self.percentile} has no effect with observer '{self.observer}'",
                key="percentile",
                advice="remove percentile",
            )
        if not 50 < self.percentile <= 100:
            raise QatkitError(
                f"{self.percentile} is out of range", key="percentile", advice="use more than 50 and at most 100"
            )

    def _check_scale(self) -> None:
        if not self.element.scaled:
            for name, only in (("strategy", "tensor"), ("scale_dtype", "float32"), ("scale_rule", "qmax")):
                if (value := getattr(self, name)) != only:
                    raise QatkitError(
                        f"'{value}' is not supported for type '{self.type}', which has no scales", key=name,
                        advice=f"set {name}: {only}",
                    )  # fmt: skip
        if self.scale_rule == "minimum" and (self.symmetric or self.scale_dtype != "float16"):
            raise QatkitError(
                "'minimum' is supported only for zero points and float16 scales", key="scale_rule",
                advice="set symmetric: false and scale_dtype: float16, or remove scale_rule",
            )  # fmt: skip
        if self.scale_rule not in ("qmax", "minimum") and not (
            self.symmetric and self.scale_rule in self.element.scale_rules
        ):
            kind = f"type '{self.type}'" if self.symmetric else f"asymmetric type '{self.type}'"
            raise QatkitError(
                f"'{self.scale_rule}' is not supported for {kind}", key="scale_rule", advice="remove scale_rule"
            )
        late = self.type == "int" and self.symmetric and self.strategy == "group" and self.scale_rule == "qmax"
        if self.late_scales and not late:
            raise QatkitError(
                "'float16_late' is supported only for symmetric integers in groups with scale_rule qmax",
                key="scale_dtype", advice="set strategy: group and group_size: 32, or use float16",
            )  # fmt: skip
        if self.float8_scales and (self.strategy != "group" or self.type not in FLOAT_FORMATS):
            raise QatkitError(
                f"'{self.scale_dtype}' is supported only for per-group floats, as in the MX formats and NVFP4",
                key="scale_dtype",
                advice="set type: float and strategy: group, or use float16",
            )  # fmt: skip
        if self.super_blocks:
            self._check_super_blocks()

    def _check_super_blocks(self) -> None:
        where = f"with scale_dtype '{self.scale_dtype}'"
        symmetric = SCALE_DTYPES[self.scale_dtype].signed
        if self.type != "int" or self.strategy != "group" or SUPER_BLOCK % (self.group_size or 1):
            raise QatkitError(
                f"'{self.scale_dtype}' is supported only for integers in groups that divide {SUPER_BLOCK} inputs, as "
                "in GGUF's K-quants",
                key="scale_dtype", advice="set type: int, strategy: group and group_size: 16 or 32, or use float16",
            )  # fmt: skip
        if self.symmetric is not symmetric:
            raise QatkitError(
                f"scale_dtype '{self.scale_dtype}' requires {'symmetric' if symmetric else 'asymmetric'} codes",
                key="symmetric", advice=f"set symmetric: {str(symmetric).lower()}",
            )  # fmt: skip
        if self.scale_rule != "qmax":
            raise QatkitError(
                f"'{self.scale_rule}' has no effect {where}, whose scales come from a search", key="scale_rule",
                advice="remove scale_rule",
            )  # fmt: skip
        if OBSERVERS[self.observer].computed:
            raise QatkitError(
                f"'{self.observer}' is not supported {where}, whose scales come from a search", key="observer",
                advice="use mse (frozen scales), lsq or, with symmetric: false, lsq_plus (learned)",
            )  # fmt: skip

    @property
    def element(self) -> Element:
        """The row of the element type."""
        return ELEMENTS[self.type]

    @property
    def is_float(self) -> bool:
        """Whether codes are bit patterns of floating-point values rather than integers."""
        return not self.element.integer

    @property
    def qmin(self) -> int | float:
        """The smallest code."""
        return self.element.code_range(self.num_bits, self.symmetric)[0]

    @property
    def qmax(self) -> int | float:
        """The largest code."""
        return self.element.code_range(self.num_bits, self.symmetric)[1]

    @property
    def float8_scales(self) -> bool:
        """Whether scales are 8-bit floats, as in the MX formats and NVFP4."""
        return self.scale_dtype.startswith("float8") or self.scale_dtype == "ue4m3"

    @property
    def late_scales(self) -> bool:
        """Whether scales are rounded to float16 after the codes are computed."""
        return self.scale_dtype == "float16_late"

    @property
    def stored_bits(self) -> float:
        """Average number of bits that a stored code takes; in TQ1_0, 256 ternary codes take 52 bytes."""
        return 1.625 if self.type == "ternary" and self.num_bits == 1 else self.num_bits

    @property
    def keeps_zeros(self) -> bool:
        """Whether a weight of zero is zero after quantization."""
        return self.element.has_zero and not self.has_minimum

    @property
    def learned(self) -> bool:
        """Whether the scale is a learned Parameter."""
        return OBSERVERS[self.observer].learned

    @property
    def scaled_per_batch(self) -> bool:
        """Whether activation scales are computed in every forward pass and never stored."""
        return self.dynamic or self.strategy in ("token", "group")

    @property
    def two_level(self) -> bool:
        """Whether scales are combined with an outer scale, per tensor (NVFP4) or per super-block (K-quants)."""
        return bool(SCALE_DTYPES[self.scale_dtype].outer)

    @property
    def super_blocks(self) -> bool:
        """Whether scales are integers times the float16 scale of a super-block (K-quants)."""
        return SCALE_DTYPES[self.scale_dtype].outer == "super-block"

    @property
    def has_minimum(self) -> bool:
        """Whether every group has a minimum instead of a zero point: ``value = code * scale - minimum``."""
        return self.super_blocks and not self.symmetric


def _choice(options: tuple[object, ...]) -> str:
    """Options as a sentence lists them: "2 to 8" for a range of integers, else "a, b or c".

    Example:
        >>> _choice((2, 3, 4, 5)), _choice((4, 6, 8)), _choice((2,))
        ('2 to 5', '4, 6 or 8', '2')
    """
    numbers = [option for option in options if isinstance(option, int)]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    *first, last = (str(option) for option in options)
    return f"{', '.join(first)} or {last}" if first else last
