"""Figures of a model's layers: weights on the quantization grid, and quantization statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from qatkit.report.histograms import INSIDE, OUTSIDE, Histogram
from qatkit.report.svg import BAD, INK, KINDS, MUTED, canvas, to_svg

WIDTH, HEIGHT = 300, 165


def weight_histogram(key: str, layer: str, before: Histogram | None, after: Histogram, kind: str) -> str:
    """Draw a histogram of one layer's weights over its codes, at the stage's start (dashed) and end (filled).

    Up to 4 bits, a dot at every code shows the number of weights that are rounded to it, on the same axis.

    Args:
        key: Prefix of the figure's IDs.
        layer: The layer's name.
        before: The histogram at the stage's start; None if the stage did not train.
        after: The histogram at the stage's end.
        kind: "post-training" or "trained"; sets the color.
    """
    colour = KINDS[kind]
    low, high = after["qmin"] - 0.5, after["qmax"] + 0.5
    few = sum(after["counts"]) < 20 * INSIDE
    edges, density = _density(after, 4 if few else 1)  # few weights in narrow bins show only sampling noise
    marks = {"mark-after": f"{layer}: {_in_words(after)}"}
    with canvas(WIDTH, HEIGHT) as (figure, (axes,)):
        for start, end in ((edges[0], low), (high, edges[-1])):
            axes.axvspan(start, end, color=BAD, alpha=0.1, linewidth=0)
        axes.stairs(
            density, edges, fill=True, facecolor=(colour, 0.25), edgecolor=colour, linewidth=1.3, gid="mark-after"
        )
        if before is not None:
            edges, density = _density(before, 4 if few else 1)
            axes.stairs(density, edges, color=INK, linewidth=1.1, linestyle=(0, (2.5, 1.5)), gid="mark-before")
            marks["mark-before"] = f"{layer}, before training: {_in_words(before)}"
        if after["bits"] <= 4 and after["integer"]:  # 256 lines would merge into a gray area
            codes = list(range(int(after["qmin"]), int(after["qmax"]) + 1))
            axes.vlines(codes, 0, _per_code(after), color=INK, linewidth=0.7, alpha=0.6)
            axes.plot(codes, _per_code(after), "o", color=INK, markersize=3.6, gid="mark-codes")
            marks["mark-codes"] = f"{layer}: weights rounded to each code"
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_visible(False)
        quarter = (after["qmax"] - after["qmin"] + 1) // 4
        axes.set_xticks([after["qmin"] + quarter * index for index in range(4)] + [after["qmax"]])
        return to_svg(figure, key, f"Weights over codes. {'; '.join(marks.values())}", marks)


def _density(histogram: Histogram, merged: int) -> tuple[list[float], list[float]]:
    """The bin edges, and the fraction of weights in each bin per unit of code."""
    counts, total = histogram["counts"], max(sum(histogram["counts"]), 1)
    width = (histogram["qmax"] - histogram["qmin"] + 1) / INSIDE * merged
    start = histogram["qmin"] - 0.5 - OUTSIDE / merged * width
    sums = [sum(counts[index : index + merged]) for index in range(0, len(counts), merged)]
    return [start + width * index for index in range(len(sums) + 1)], [count / total / width for count in sums]


def _per_code(histogram: Histogram) -> list[float]:
    """The fraction of weights that round to each code; clipped weights count towards the outermost codes."""
    counts, total = histogram["counts"], max(sum(histogram["counts"]), 1)
    per = INSIDE >> histogram["bits"]
    fractions = [sum(counts[index : index + per]) / total for index in range(OUTSIDE, OUTSIDE + INSIDE, per)]
    fractions[0] += sum(counts[:OUTSIDE]) / total
    fractions[-1] += sum(counts[-OUTSIDE:]) / total
    return fractions


def clipped_fraction(histogram: Histogram) -> float:
    """The fraction (0 to 1) of weights outside the range of the codes."""
    counts = histogram["counts"]
    return (sum(counts[:OUTSIDE]) + sum(counts[-OUTSIDE:])) / max(sum(counts), 1)


def _in_words(histogram: Histogram) -> str:
    codes = f"codes {histogram['qmin']} to {histogram['qmax']}"
    return f"{sum(histogram['counts']):,} weights on {codes}, {clipped_fraction(histogram):.1%} clipped"


_PANELS: list[tuple[str, Callable[[Mapping[str, Any]], float], str]] = [
    ("weight bits", lambda layer: layer["weight_bits"], "{:.0f}"),
    ("fraction of code bytes (%)", lambda layer: 100 * layer["fraction"], "{:.1f}"),
    ("weight error (%)", lambda layer: 100 * layer["weight_error"], "{:.1f}"),
    ("clipped (%)", lambda layer: 100 * layer["clip_rate"], "{:.1f}"),
    ("zeros (%)", lambda layer: 100 * layer["sparsity"], "{:.1f}"),
]


def layer_picture(key: str, stages: Sequence[Mapping[str, Any]], count: int, wide: bool) -> str:
    """Draw bits, fraction of the size, rounding error, clipped weights and zeros per layer, with a bar per stage.

    Args:
        key: Prefix of the figure's IDs.
        stages: ``stage``, ``kind`` and ``layers`` of the quantized rows of a report.
        count: The number of layers to draw; the largest are selected.
        wide: Draw the five panels side by side; otherwise, stack them for narrow screens.
    """
    names = largest([layer["name"] for row in stages for layer in row["layers"]], stages, count)
    thickness = 0.78 / len(stages)
    height = max(19, 14 * len(stages)) * len(names)
    marks: dict[str, str] = {}
    size = (1060, height + 55) if wide else (350, 5 * (height + 55))
    with canvas(*size, *((1, 5) if wide else (5, 1)), share_y=True) as (figure, panels):
        for number, (axes, (title, measure, form)) in enumerate(zip(panels, _PANELS, strict=True)):
            for index, row in enumerate(stages):
                total = max(sum(layer["code_bytes"] for layer in row["layers"]), 1)
                for layer in row["layers"]:
                    if layer["name"] not in names:
                        continue
                    value = measure({**layer, "fraction": layer["code_bytes"] / total})
                    y = names.index(layer["name"]) + thickness * (index - (len(stages) - 1) / 2)
                    gid = f"mark-{len(marks)}"
                    axes.barh(y, value, thickness * 0.86, color=KINDS[row["kind"]], gid=gid)[0].set_gid(gid)
                    axes.annotate(
                        form.format(value), (value, y), (3, 0), textcoords="offset points", va="center", color=MUTED,
                        fontsize=11 if len(stages) < 3 else 9.5,
                    )  # fmt: skip
                    marks[gid] = f"{row['stage']}, {layer['name']}: {title} {form.format(value)}"
            axes.set_title(title, loc="left", color=INK)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), [_short(name) for name in names])
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.tick_params(labelleft=not wide or number == 0)
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.16)
            axes.set_xlim(left=0, right=max(axes.get_xlim()[1], 1.0))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=axes.get_xlim()[1] > 3))
        titles = ", ".join(title for title, _, _ in _PANELS)
        stage_names = ", ".join(row["stage"] for row in stages)
        return to_svg(figure, key, f"Layers of {stage_names}: {titles}. The tables contain all values.", marks)


def _short(name: str) -> str:
    """Shorten a long name to its end, which distinguishes layers; tooltips contain the full name."""
    return name if len(name) <= 26 else f"…{name[-25:]}"


def largest(names: Sequence[str], stages: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Return the `count` layers with the most weights, in the order of the model."""
    weights = {layer["name"]: layer["weights"] for row in stages for layer in row["layers"]}
    chosen = set(sorted(weights, key=lambda name: -weights[name])[:count])
    return [name for name in dict.fromkeys(names) if name in chosen]
