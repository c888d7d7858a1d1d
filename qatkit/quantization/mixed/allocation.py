"""Mixed precision: choose one format per layer group to minimize the loss within a size budget.

Every group has exactly one of its candidate formats, and the total size must stay within the budget. This is the
multiple-choice knapsack problem, which an integer program solves exactly. It assumes that loss increases are additive
(Dong et al., HAWQ-V2, 2020, https://arxiv.org/abs/1911.03852, section 3.2), so measure the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qatkit.errors import QatkitError
from qatkit.quantization.mixed.records import Option, Sensitivity


def allocate(
    sensitivity: Sensitivity, budget_bytes: int | None = None, average_bits: float | None = None
) -> dict[str, str]:
    """Choose one format for every group, minimizing the total loss increase within a budget.

    Negative increases are treated as 0, and the smaller of two formats with the same increase is chosen. The total is
    minimal to within 1e-10 of the largest increase.

    Args:
        sensitivity: The result of `measure_sensitivity`.
        budget_bytes: Size of all measured weights with their scales and zero points, in bytes.
        average_bits: The same budget in bits per weight. Pass exactly one of `average_bits` and `budget_bytes`.

    Returns:
        The candidate of each group, by `Group.name`, in model order.

    Raises:
        QatkitError: `budget_bytes` and `average_bits` are both set or both missing, the smallest formats exceed the
            budget, or scipy is not installed.

    Example:
        >>> from qatkit.quantization.mixed.records import Group, Option, Sensitivity
        >>> options = {"int8": Option(bytes=8, increase=0.0), "int4": Option(bytes=4, increase=0.1)}
        >>> harder = {"int8": Option(bytes=8, increase=0.0), "int4": Option(bytes=4, increase=0.5)}
        >>> measured = Sensitivity(1.0, {}, (Group(("head",), 8, options), Group(("tail",), 8, harder)))
        >>> allocate(measured, budget_bytes=12)
        {'head': 'int4', 'tail': 'int8'}
    """
    if (budget_bytes is None) == (average_bits is None):
        raise QatkitError(
            f"exactly one budget is required, got budget_bytes={budget_bytes} and average_bits={average_bits}",
            key="budget_bytes", advice="pass either budget_bytes or average_bits",
        )  # fmt: skip
    budget = budget_bytes if budget_bytes is not None else math.floor((average_bits or 0) * sensitivity.weights / 8)
    options = [_efficient(group.options) for group in sensitivity.groups]
    smallest = sum(min(option.bytes for option in choices.values()) for choices in options)
    if budget < smallest:
        bits = 8 * smallest / sensitivity.weights
        key, value = ("average_bits", average_bits) if budget_bytes is None else ("budget_bytes", budget_bytes)
        raise QatkitError(
            f"{value} is too small: the smallest formats take {smallest} bytes, {bits:.4f} bits per weight including "
            "scales",
            key=key,
            advice=f"use {smallest} bytes or {math.ceil(bits * 1e4) / 1e4} bits, or measure a smaller candidate",
        )
    chosen = _solve(options, budget - smallest)
    return {group.name: name for group, name in zip(sensitivity.groups, chosen, strict=True)}


def totals(sensitivity: Sensitivity, allocation: Mapping[str, str]) -> tuple[int, float]:
    """Return the bytes and the total loss increase of an allocation; negative increases are treated as 0."""
    chosen = [group.options[allocation[group.name]] for group in sensitivity.groups]
    return sum(option.bytes for option in chosen), sum(option.cost for option in chosen)


def _efficient(options: Mapping[str, Option]) -> dict[str, Option]:
    """Drop options that another one matches or beats in bytes and cost; smallest first."""
    kept: dict[str, Option] = {}
    for name, option in sorted(options.items(), key=lambda item: (item[1].bytes, item[1].cost)):
        if all(option.cost < smaller.cost for smaller in kept.values()):
            kept[name] = option
    return kept


def _solve(options: Sequence[Mapping[str, Option]], spare: int) -> list[str]:
    """Pick one option per group; `spare` is the budget beyond the smallest options, in bytes."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise QatkitError("allocation needs scipy", advice="run: pip install 'qatkit[allocation]'") from error
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
    # scaled for the solver, which accepts violations of 1e-6 and fails on coefficients of 1e12
    most_bytes, most = spare or 1, max(costs) or 1.0
    within = csr_array([[1e4 * (more / most_bytes) for more in extra]])
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(within, -math.inf, 1e4)]
    while True:
        solution = milp(
            [1e4 * (cost / most) for cost in costs], integrality=1, bounds=Bounds(0, 1), constraints=rules,
            options={"mip_rel_gap": 0},
        )  # fmt: skip
        assert solution.x is not None, solution.message  # every group's smallest option is a solution
        picked = [column for column in columns if solution.x[column] > 0.5]
        if sum(extra[column] for column in picked) <= spare:
            return [names[column] for column in picked]
        # the budget is exceeded by less than the solver's tolerance: exclude only this choice and solve again
        rule = csr_array(([1.0] * len(picked), ([0] * len(picked), picked)), shape=(1, len(names)))
        rules.append(LinearConstraint(rule, -math.inf, len(picked) - 1))
