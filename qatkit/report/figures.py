"""Figures of a run: metric versus size or latency, and training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from qatkit.report.curves import Curve, Curves
from qatkit.report.svg import CARD, MARKERS, MUTED, SERIES, canvas, to_svg
from qatkit.tasks.metrics import METRICS, Metric

WIDTH = 370


@dataclass(frozen=True)
class Point:
    """One exported file in a figure of metric versus cost."""

    label: str
    """The label of the marker: the stage's name, or the number of the run."""
    words: str
    """The stage and the run, for the tooltip."""
    kind: str
    """One of "dense", "post-training" and "trained"."""
    colour: str
    cost: float
    low: float
    """First quartile of the cost; equal to the cost if there is no spread."""
    high: float
    value: float
    """The value of the metric; accuracies are between 0 and 1."""
    samples: int
    """The number of test samples or tokens."""


def tradeoff(key: str, points: Sequence[Point], metric: Metric, cost: str, unit: str) -> str:
    """Draw a metric versus size or latency, with confidence intervals and quartiles of the measured latency.

    Args:
        key: Prefix of the figure's IDs.
        points: The files.
        metric: The metric on the vertical axis; only accuracies have a confidence interval.
        cost: The quantity on the horizontal axis, such as "size".
        unit: The unit of `cost`.
    """
    marks = {}
    with canvas(WIDTH, 290) as (figure, (axes,)):
        _cost_axis(axes, points)
        intervals = [
            interval(point.value, point.samples) if metric.percent else (point.value, point.value) for point in points
        ]
        _metric_axis(axes, metric, min(low for low, _ in intervals), max(high for _, high in intervals))
        for index, (point, (low, high)) in enumerate(zip(points, intervals, strict=True)):
            y = metric.scale * point.value
            bar = [metric.scale * low, metric.scale * high]
            axes.plot([point.cost] * 2, bar, color=point.colour, linewidth=1, alpha=0.55)
            axes.plot([point.low, point.high], [y, y], color=point.colour, linewidth=1, alpha=0.55)
            axes.plot(
                point.cost, y, MARKERS[point.kind], color=point.colour, markersize=9.5, markeredgecolor=CARD,
                markeredgewidth=1.2, gid=f"mark-{index}", zorder=3,
            )  # fmt: skip
            marks[f"mark-{index}"] = f"{point.words}: {metric.show(point.value)} at {point.cost:.4g} {unit}"
        figure.draw_without_rendering()  # computes the positions
        _place_labels(axes, points, metric)
        axes.set_xlabel(f"{cost} ({unit})")
        axes.set_ylabel(f"test {metric.name} ({metric.unit})" if metric.unit else f"test {metric.name}")
        return to_svg(figure, key, f"{metric.title} versus {cost}. {'; '.join(marks.values())}", marks)


def interval(accuracy: float, samples: int) -> tuple[float, float]:
    """The 95% confidence interval of a measured accuracy (Wilson score interval)."""
    if samples == 0:
        return accuracy, accuracy
    z2 = 1.96**2 / samples
    middle, half = accuracy + z2 / 2, math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / 4))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _metric_axis(axes: Axes, metric: Metric, bottom: float, top: float) -> None:
    """Leave space around the values; use a logarithmic axis if the best value would touch the edge."""
    if not metric.percent and top > 20 * bottom:
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.6, top * 1.6)
        _plain_log_ticks(axes.yaxis, bottom / 1.6, top * 1.6)
        return
    room = max(0.12 * (top - bottom), 0.005)
    axes.set_ylim(metric.scale * (bottom - room), metric.scale * (top + room))


def _cost_axis(axes: Axes, points: Sequence[Point]) -> None:
    """Start at zero, so that lengths are comparable; use a log axis if the smallest value would touch the edge."""
    small, large = min(point.low for point in points), max(point.high for point in points)
    typical = max(point.cost for point in points)
    if typical > 20 * min(point.cost for point in points):
        axes.set_xscale("log")
        axes.set_xlim(small / 1.6, large * 1.6)
        _plain_log_ticks(axes.xaxis, small / 1.6, large * 1.6)
    else:
        # an extreme quartile, measured on a busy machine, may be cut off
        axes.set_xlim(0, min(large, 2 * typical) * 1.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _place_labels(axes: Axes, points: Sequence[Point], metric: Metric) -> None:
    """Place each label next to its marker, at the position with the least overlap with markers and other labels."""
    spots = [axes.transData.transform((point.cost, metric.scale * point.value)) for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    places = [(side * dx, dy) for dx, dy in ((9, 9), (9, -9), (11, 0), (9, 22), (9, -22)) for side in (1, -1)]
    for point, (x, y) in zip(points, spots, strict=True):
        width = 7.6 * len(point.label)

        def box(place: tuple[int, int], x: float = x, y: float = y, width: float = width) -> _Box:
            left = x + place[0] - (width if place[0] < 0 else 0)
            return left, y + place[1] - 7, left + width, y + place[1] + 7

        def cost(place: tuple[int, int]) -> float:
            own, (left, bottom, right, top) = box(place), axes.bbox.extents
            outside = own[0] < left or own[1] < bottom or own[2] > right + 8 or own[3] > top + 8
            return sum(_overlap(own, other) for other in taken) + 1e4 * outside

        dx, dy = best = min(places, key=cost)
        taken.append(box(best))
        axes.annotate(
            point.label, (point.cost, metric.scale * point.value), (dx, dy), textcoords="offset points",
            ha="left" if dx > 0 else "right", va="center", color=point.colour, fontweight="bold",
        )  # fmt: skip


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


GROUPS = {row.name: f"{row.title} (%)" if row.percent else row.title for row in METRICS.values()}
GROUPS["quant"] = "Quantization (%)"
"""Titles of the training figures, in display order."""
_ENDS = {**{name: name for name in METRICS}, "agreement": "accuracy"}


def curve_groups(curves: Curves) -> dict[str, dict[str, Curve]]:
    """Group the curves that share a figure by group name; omit a loss that duplicates the label loss."""
    metrics = {name: curve for name, curve in curves["metrics"].items() if len(curve["steps"]) > 1}
    if metrics.get("train/label_loss") == metrics.get("train/loss"):
        metrics.pop("train/loss", None)
    groups: dict[str, dict[str, Curve]] = {}
    for name in sorted(metrics, key=lambda name: (not name.startswith("val/"), name)):
        kind = next((kind for end, kind in _ENDS.items() if name.endswith(end)), name.split("/")[0])
        groups.setdefault(kind, {})[name] = metrics[name]
    return {kind: groups[kind] for kind in sorted(groups, key=lambda kind: ([*GROUPS, kind].index(kind), kind))}


def training_curves(key: str, stage: str, kind: str, curves: dict[str, Curve], resumed_at: Sequence[int]) -> str:
    """Draw the curves of one group by optimizer step of a stage.

    Args:
        key: Prefix of the figure's IDs.
        stage: The stage's name.
        kind: The group's name.
        curves: The curves by metric.
        resumed_at: Steps at which a killed run was resumed.
    """
    marks = {}
    percent = METRICS[kind].scale if kind in METRICS else 100 if kind == "quant" else 1
    with canvas(WIDTH, 240) as (figure, (axes,)):
        for index, (name, curve) in enumerate(curves.items()):
            values = [percent * value for value in curve["values"]]
            label = name.removeprefix("quant/").removeprefix("distill/").replace("/", " ").replace("_", " ")
            axes.plot(
                curve["steps"], values, color=SERIES[index % len(SERIES)], label=label, gid=f"mark-{index}",
                linewidth=1 if len(values) > 80 else 1.8, linestyle=("-", "--", "-.")[index % 3],
            )  # fmt: skip
            marks[f"mark-{index}"] = f"{label}: {values[0]:.3g} at the start, {values[-1]:.3g} at the end"
        for step in resumed_at:
            axes.axvline(step, color=MUTED, linewidth=1, linestyle=":")
            axes.annotate("resumed", (step, 0.02), xycoords=("data", "axes fraction"), color=MUTED, rotation=90,
                          fontsize=10, ha="right", va="bottom")  # fmt: skip
        positive = [value for curve in curves.values() for value in curve["values"]]
        if kind in ("loss", "perplexity") and min(positive) > 0 and max(positive) > 20 * min(positive):
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis, *axes.get_ylim())
        if kind == "accuracy":
            _at_least(axes, 4.0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("optimizer step")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, columnspacing=1.2)
        return to_svg(figure, key, f"{stage}, {kind} during training. {'; '.join(marks.values())}", marks)


def _at_least(axes: Axes, span: float) -> None:
    """Show a range of at least `span` percentage points, so that changes on single samples do not look large."""
    low, high = axes.dataLim.intervaly
    room = max(0.05 * (high - low), (span - (high - low)) / 2)
    top = min(high + room, 100.3)
    axes.set_ylim(min(low - room, top - span), top)


def _plain_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Place ticks at 1, 10, 100 (and at 2 and 5 if there are few) and label them with plain numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
