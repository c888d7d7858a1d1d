"""The best files of a sweep under a constraint: the smallest and the fastest within a loss of the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from qatkit.tasks.metrics import Metric
from qatkit.trials.results import Result

LOSSES = (0.0, 0.005, 0.01, 0.02, 0.05)
"""Largest losses of the metric: percentage points for metrics in percent, otherwise relative to the dense model."""


@dataclass(frozen=True)
class Best:
    """The best file within a loss."""

    limit: str
    """The constraint."""
    goal: str
    """What is smallest, such as "size"."""
    result: Result
    value: str
    """Its size or latency."""


def dense_result(results: Sequence[Result]) -> Result | None:
    """Return the uncompressed file with the best metric, to which losses are relative; None if there is none.

    A file that failed verification, or whose metric is NaN or infinite, is left out.
    """
    dense = [result for result in results if result.row["kind"] == "dense" and result.row["verification"]["passed"]]
    return min((result for result in dense if math.isfinite(_rank(result))), key=_rank, default=None)


def best_files(results: Sequence[Result], losses: Sequence[float] = LOSSES) -> list[Best]:
    """Return the smallest and the fastest verified file within each loss; empty without an uncompressed file.

    Args:
        results: Results with the same metric, on the same data.
        losses: Largest losses, as in `LOSSES`.
    """
    reference = dense_result(results)
    if reference is None:
        return []
    found = []
    passed = [result for result in results if result.row["verification"]["passed"]]
    for loss in losses:
        within = [result for result in passed if lost(reference, result) <= loss + 1e-12]
        smallest = min(within, key=lambda result: (result.row["bytes"], _rank(result)))
        limit = _limit(reference.metric, loss)
        found.append(Best(limit, "size", smallest, f"{smallest.row['bytes'] / 1000:.1f} kB"))
        timed = [(each["batch_size"], each["median_ms"], result) for result in within for each in result.row["latency"]]
        for size in dict.fromkeys(size for size, *_ in timed):
            _, milliseconds, fastest = min((each for each in timed if each[0] == size), key=itemgetter(1))
            found.append(Best(limit, f"latency, batch of {size}", fastest, f"{milliseconds:.3f} ms"))
    return found


def lost(reference: Result, result: Result) -> float:
    """Return the loss of a result: a difference for metrics in percent, otherwise relative to the reference.

    A loss relative to zero is infinite.
    """
    metric = reference.metric
    before, after = metric.of(reference.row), metric.of(result.row)
    worse = before - after if metric.higher_is_better else after - before
    if metric.percent or worse == 0:
        return worse
    return worse / abs(before) if before else math.copysign(math.inf, worse)


def _limit(metric: Metric, loss: float) -> str:
    points = " point" if loss == 0.01 else " points"
    return f"at most {100 * loss:g}{points if metric.percent else '%'} worse" if loss else "not worse"


def _rank(result: Result) -> float:
    value = result.metric.of(result.row)
    return -value if result.metric.higher_is_better else value
