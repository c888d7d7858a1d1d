"""Convert matplotlib figures to inline SVG that follows the style of the page.

Colors become CSS variables of the page, so the same figure works in the light and the dark theme. Text remains text in
the page's font. IDs are prefixed, because all figures of a page share one namespace.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# suppress the warning that building the font cache takes a while
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

INK, MUTED, LINE, CARD, BAD = "#18202b", "#566173", "#dde2ea", "#fffffe", "#b3261f"
KINDS = {"dense": "#65707e", "post-training": "#b4590f", "trained": "#0b5fc1"}
MARKERS = {"dense": "s", "post-training": "D", "trained": "o"}
SERIES = ["#0b5fc2", "#b45911", "#0f7b5e", "#a3308e", "#7a6a01", "#c0392a", "#4b52b7", "#37606a"]
"""Colors of runs and curves, in order."""

_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", CARD: "card", BAD: "bad"}
_VARIABLES |= {colour: kind for kind, colour in KINDS.items()}
_VARIABLES |= {colour: f"series-{position}" for position, colour in enumerate(SERIES)}

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 1,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.borderaxespad": 0.2,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "patch.linewidth": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "qatkit",
    "text.color": INK,
    "text.parse_math": False,  # layer names may contain $
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 11.5,
}


@contextmanager
def canvas(
    width: int, height: int, rows: int = 1, columns: int = 1, share_y: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Create a figure in the page's style, and its axes row by row; draw and call `to_svg` inside the ``with`` block.

    Args:
        width: Width in CSS pixels; at this width, the text has the size of the page's text.
        height: Height in CSS pixels.
        rows: Rows of axes.
        columns: Columns of axes.
        share_y: Whether all axes share the y-axis.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
        yield figure, list(axes.flat)


def to_svg(figure: Figure, key: str, label: str, marks: Mapping[str, str]) -> str:
    """Convert a figure to an inline ``<svg>`` without external references.

    Args:
        figure: A figure from `canvas`.
        key: Prefix of the IDs; must be unique on the page.
        label: A description of the figure for screen readers.
        marks: Tooltips by the gid of their artist.
    """
    buffer = io.StringIO()
    figure.canvas.print_svg(buffer)  # type: ignore[attr-defined]  # savefig would draw twice
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would apply to the entire page
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(?<= )(d|x|y|transform)="[^"]*"', lambda match: _rounded(match[0]), text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: _variable(match[0]), text)
    for gid, words in marks.items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}" class="mark"><title>{escape(words)}</title>')
    text = _lean(text.replace("xlink:href", "href"), set(marks))
    text = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{key}-", text)
    view = re.search(r'viewBox="[\d. ]+"', text)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{escape(label)}" data-figure="{key}">'
    return head + text[text.index(">") + 1 :].strip()


def _lean(text: str, marks: set[str]) -> str:
    """Remove unreferenced IDs and groups that are then empty, which make up half of the file."""
    used = marks | set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r">\s+<", "><", text)
    while (shorter := re.sub(r"<(g|defs)></\1>|<g/>|<g>(<(?:path|text|use)[^>]*/>)</g>", r"\2", text)) != text:
        text = shorter
    return text


def _rounded(attribute: str) -> str:
    short = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), attribute)
    return re.sub(r"\s+", " ", short)


def _variable(colour: str) -> str:
    return f"var(--{_VARIABLES[colour]})" if colour in _VARIABLES else colour
