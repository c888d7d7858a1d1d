"""Show the sensitivity of each layer to each candidate scheme as a Markdown table and as a figure."""

from __future__ import annotations

import io
import math

from qatkit.quantization.mixed.records import Sensitivity


def markdown(sensitivity: Sensitivity) -> str:
    """Return a Markdown table with one row per layer group: loss increase and bits per weight of every candidate."""
    names = list(sensitivity.candidates)
    lines = [
        "# Sensitivity",
        "",
        f"Loss without quantization: {sensitivity.loss:.6g}. Each cell shows the loss increase when only the layers of "
        "the row are quantized, and the bits per weight, including scales and zero points.",
        "",
        f"| layers | weights | {' | '.join(names)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in names)} |",
    ]
    for group in sensitivity.groups:
        cells = [
            f"{option.increase:+.4g} ({8 * option.bytes / group.weights:.2f} bits)" if option is not None else "-"
            for option in (group.options.get(name) for name in names)
        ]
        lines.append(f"| {_cell(group.name)} | {group.weights:,} | {' | '.join(cells)} |")
    if sensitivity.left_out:
        lines += ["", *(f"- {sentence}" for sentence in sensitivity.left_out)]
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    return "`" + name.replace("|", "\\|") + "`"


def picture(sensitivity: Sensitivity) -> str:
    """Return a standalone SVG with one row per layer group, one marker per candidate, and a logarithmic axis.

    Increases that are negative, zero or very small are drawn at the left edge.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from qatkit.report.svg import CARD, MUTED, SERIES, canvas

    groups = sensitivity.groups
    increases = [option.increase for group in groups for option in group.options.values() if option.increase > 0]
    high = max(increases, default=1.0)
    low = max(min(increases, default=high), high * 1e-6) / 3
    with canvas(720, 70 + 22 * len(groups)) as (figure, (axes,)):
        for index, name in enumerate(sensitivity.candidates):
            places = [row for row, group in enumerate(groups) if name in group.options]
            values = [max(groups[row].options[name].increase, low) for row in places]
            axes.plot(
                values, places, "osD^vP"[index % 6], color=SERIES[index % len(SERIES)], label=name, markersize=7,
                markeredgecolor=CARD, clip_on=False,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(low, 10 ** (math.log10(high) + 0.1))
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), [_short(group.layers) for group in groups])
        axes.set_xlabel("loss increase when only these layers are quantized (left edge: none)", color=MUTED)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=6, columnspacing=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor=CARD, metadata={"Date": None})
    return buffer.getvalue()


def _short(layers: tuple[str, ...]) -> str:
    """Return the end of the first layer's name, and the number of additional layers."""
    name = layers[0] if len(layers[0]) <= 40 else f"…{layers[0][-39:]}"
    return name if len(layers) == 1 else f"{name} +{len(layers) - 1}"
