"""Mixed precision as a choice: one format for each group of layers, so that the losses add up to least under a budget.

Each group of layers takes exactly one of its candidate formats, and the bytes of all must stay within the budget: the
multiple-choice knapsack problem, solved exactly by one integer program. That increases of the loss add up is the one
assumption (Dong et al., HAWQ-V2, 2020, https://arxiv.org/abs/1911.03852, section 3.2); measure the result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from qatkit.errors import QatkitError
from qatkit.schemes import SCHEMES, Scheme
from qatkit.spec import QuantSpec

_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}


def stored_bytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bytes of a quantized weight: packed codes, scales, and zero points where codes are asymmetric.

    Codes and zero points are packed at `num_bits` without gaps; scales have their dtype, and those of two levels one
    float32 more. A file's header and alignment come on top.

    Args:
        shape: Of the weight, ``[out, in, ...]``.
        spec: Its quantization.

    Example:
        >>> from qatkit import scheme
        >>> stored_bytes([1, 32], scheme("Q4_0").weight), stored_bytes([1, 32], scheme("Q8_0").weight)
        (18, 34)
    """
    scales = 1
    if spec.strategy == "channel":
        scales = shape[0]
    elif spec.group_size is not None:
        scales = shape[0] * (shape[1] // spec.group_size)
    elif spec.block_structure is not None:
        rows, columns = spec.block_structure
        scales = math.ceil(shape[0] / rows) * math.ceil(shape[1] / columns)
    codes = math.ceil(math.prod(shape) * spec.num_bits / 8)
    zero_points = 0 if spec.symmetric else math.ceil(scales * spec.num_bits / 8)
    return codes + zero_points + scales * _SCALE_BYTES[spec.scale_dtype] + 4 * spec.two_level


@dataclass(frozen=True)
class Option:
    """What one format costs a group of layers."""

    bytes: int
    increase: float
    """The loss with this group alone quantized, less the loss with nothing quantized; noise can make it negative."""

    @property
    def cost(self) -> float:
        """The increase as allocation counts it: rounding improves no model, so less than zero is noise and counts 0."""
        return max(self.increase, 0.0)


@dataclass(frozen=True)
class Group:
    """Layers that get one format."""

    layers: tuple[str, ...]
    weights: int
    """Number of weights; a tied one counts once."""
    options: dict[str, Option]
    """By candidate; those that do not fit the layers are missing."""

    @property
    def name(self) -> str:
        """The layers' names."""
        return " + ".join(self.layers)


@dataclass(frozen=True)
class Sensitivity:
    """What each format does to each group of layers, measured by `measure_sensitivity`."""

    loss: float
    """With nothing quantized."""
    candidates: dict[str, Scheme]
    groups: tuple[Group, ...]
    others: tuple[str, ...] = ()
    """The model's other modules that hold parameters: a glob must not catch them by accident."""
    left_out: tuple[str, ...] = ()
    """A sentence for every candidate that a group cannot have."""

    @property
    def weights(self) -> int:
        """Number of weights in all groups."""
        return sum(group.weights for group in self.groups)

    def to_plain(self) -> dict[str, Any]:
        """Plain data that `from_plain` reads back."""
        return asdict(self)

    @classmethod
    def from_plain(cls, content: Any) -> Sensitivity:
        """Read what `to_plain` wrote, also through JSON.

        Raises:
            QatkitError: it is something else.
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
                f"sensitivity: this is not what `qatkit sensitivity` writes ({type(error).__name__}: {error}); "
                "measure again"
            ) from None


def allocate(
    sensitivity: Sensitivity, budget_bytes: int | None = None, average_bits: float | None = None
) -> dict[str, str]:
    """Choose one format for every group so that the sum of the increases of the loss is the least within the budget.

    Increases below zero count as 0, and of two formats that cost a group the same the smaller one is taken. The sum is
    the least to 1e-10 of the largest increase.

    Args:
        sensitivity: From `measure_sensitivity`.
        budget_bytes: Bytes of all measured weights with their scales and zero points; or instead
        average_bits: The same in bits per weight, scales and zero points included.

    Returns:
        The candidate of each group, by `Group.name`, in the model's order.

    Raises:
        QatkitError: not exactly one budget is given, the smallest formats do not fit it, or scipy is not installed.

    Example:
        >>> options = {"int8": Option(bytes=8, increase=0.0), "int4": Option(bytes=4, increase=0.1)}
        >>> harder = {"int8": Option(bytes=8, increase=0.0), "int4": Option(bytes=4, increase=0.5)}
        >>> measured = Sensitivity(1.0, {}, (Group(("head",), 8, options), Group(("tail",), 8, harder)))
        >>> allocate(measured, budget_bytes=12)
        {'head': 'int4', 'tail': 'int8'}
    """
    if (budget_bytes is None) == (average_bits is None):
        raise QatkitError("allocate: write one budget, budget_bytes or average_bits, and not both")
    budget = budget_bytes if budget_bytes is not None else math.floor((average_bits or 0) * sensitivity.weights / 8)
    options = [_efficient(group.options) for group in sensitivity.groups]
    smallest = sum(min(option.bytes for option in choices.values()) for choices in options)
    if budget < smallest:
        bits = 8 * smallest / sensitivity.weights
        seen = f"average_bits: {average_bits}" if budget_bytes is None else f"budget_bytes: {budget_bytes}"
        raise QatkitError(
            f"{seen} is too small: the smallest formats take {smallest} bytes, {bits:.4f} bits per weight with scales; "
            f"write {smallest} bytes or {math.ceil(bits * 1e4) / 1e4} bits, or measure a smaller candidate"
        )
    chosen = _solve(options, budget - smallest)
    return {group.name: name for group, name in zip(sensitivity.groups, chosen, strict=True)}


def totals(sensitivity: Sensitivity, allocation: Mapping[str, str]) -> tuple[int, float]:
    """Bytes of an allocation, and the sum of the increases of the loss as `allocate` counts them."""
    chosen = [group.options[allocation[group.name]] for group in sensitivity.groups]
    return sum(option.bytes for option in chosen), sum(option.cost for option in chosen)


def _efficient(options: Mapping[str, Option]) -> dict[str, Option]:
    """The options that no other one beats, or equals, in both bytes and cost: smallest first."""
    kept: dict[str, Option] = {}
    for name, option in sorted(options.items(), key=lambda item: (item[1].bytes, item[1].cost)):
        if all(option.cost < smaller.cost for smaller in kept.values()):
            kept[name] = option
    return kept


def _solve(options: Sequence[Mapping[str, Option]], spare: int) -> list[str]:
    """Pick one option of each group; `spare` are the bytes that are left when every group has its smallest one."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise QatkitError("allocation needs scipy: pip install 'qatkit[allocation]'") from error
    smallest = [min(option.bytes for option in choices.values()) for choices in options]
    usable = [
        (row, name, option.bytes - smallest[row], option.cost)
        for row, choices in enumerate(options)
        for name, option in choices.items()
        if option.bytes - smallest[row] <= spare
    ]
    rows, names, extra, costs = zip(*usable, strict=True)
    columns = range(len(names))
    one_each = csr_array(([1.0] * len(names), (rows, columns)), shape=(len(options), len(names)))
    # numbers that suit the solver: it leaves gaps of 1e-6 open, and fails on those of 1e12
    most_bytes, most = spare or 1, max(costs) or 1.0
    within = csr_array([[1e4 * (more / most_bytes) for more in extra]])
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(within, -math.inf, 1e4)]
    while True:
        found = milp(
            [1e4 * (cost / most) for cost in costs], integrality=1, bounds=Bounds(0, 1), constraints=rules,
            options={"mip_rel_gap": 0},
        )  # fmt: skip
        assert found.x is not None, found.message  # every group's smallest option is a solution
        picked = [column for column in columns if found.x[column] > 0.5]
        if sum(extra[column] for column in picked) <= spare:
            return [names[column] for column in picked]
        # the budget was overdrawn by less than the solver's tolerance: this one choice is forbidden, no other
        rule = csr_array(([1.0] * len(picked), ([0] * len(picked), picked)), shape=(1, len(names)))
        rules.append(LinearConstraint(rule, -math.inf, len(picked) - 1))


def allocated_layers(sensitivity: Sensitivity, allocation: Mapping[str, str]) -> dict[str, Scheme]:
    """The `layers` of `prepare_qat` that give every layer the format it was allocated.

    Layers that differ only in the numbers inside their names are joined into one glob where that saves lines and the
    glob catches no other layer of the model; exceptions follow it, since the last pattern that matches decides.

    Args:
        sensitivity: What the allocation was made from.
        allocation: From `allocate`, or changed by hand.
    """
    formats = {layer: allocation[group.name] for group in sensitivity.groups for layer in group.layers}
    families: dict[str, list[str]] = {}
    for layer in formats:
        families.setdefault(_without_numbers(layer), []).append(layer)
    layers: dict[str, Scheme] = {}
    for glob, family in families.items():
        usual, times = Counter(formats[layer] for layer in family).most_common(1)[0]
        caught = {name for name in (*formats, *sensitivity.others) if fnmatchcase(name, glob)}
        joined = times > 1 and caught == set(family)
        if joined:
            layers[glob] = sensitivity.candidates[usual]
        layers |= {
            escape(layer): sensitivity.candidates[formats[layer]]
            for layer in family
            if not joined or formats[layer] != usual
        }
    return layers


def _without_numbers(layer: str) -> str:
    *parents, own = layer.split(".")
    return ".".join(["*" if part.isdecimal() else escape(part) for part in parents] + [escape(own)])


def plain_layers(layers: Mapping[str, Scheme]) -> dict[str, dict[str, Any]]:
    """The same as a recipe's ``quantize.layers`` says it: a scheme by its name, or specs without their defaults."""
    return {glob: _plain_scheme(how) for glob, how in layers.items()}


def _plain_scheme(how: Scheme) -> dict[str, Any]:
    if (name := next((name for name, known in SCHEMES.items() if known == how), None)) is not None:
        return {"scheme": name}
    sides = {"weight": how.weight, "activation": how.activation}
    return {side: _plain_spec(spec) for side, spec in sides.items() if spec is not None}


def _plain_spec(spec: QuantSpec) -> dict[str, Any]:
    given = {field.name: getattr(spec, field.name) for field in fields(spec)}
    kept = {f.name: given[f.name] for f in fields(spec) if f.name == "num_bits" or given[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
