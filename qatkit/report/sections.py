"""Values for the page template: figures, tables and sentences for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qatkit.report.figures import GROUPS, Point, curve_groups, tradeoff, training_curves
from qatkit.report.layer_figures import clipped_fraction, largest, layer_picture, weight_histogram
from qatkit.report.metrics import metric_of
from qatkit.report.sentences import headline, parity, tiles
from qatkit.report.speed import kernel_notes, missing_baselines, slowdowns
from qatkit.report.svg import KINDS
from qatkit.report.tables import (
    comparison,
    decoding_notes,
    decoding_table,
    files_of,
    format_words,
    headers,
    model_table,
    sparse_notes,
    split_note,
    zeros_table,
)
from qatkit.tasks.metrics import Metric

HISTOGRAMS, BARS = 12, 24
"""The number of layers drawn as histograms and as bars; fewer if the page contains multiple runs."""


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` with a title and a note."""

    title: str
    note: str
    svg: str


def section(key: str, report: dict[str, Any], name: str, runs: int) -> dict[str, Any]:
    """Return everything that the page shows about one run.

    Args:
        key: Prefix of the IDs of the figures.
        report: The content of ``report.json``.
        name: The run's name on the page.
        runs: The number of runs on the page.
    """
    columns, rows = merged_table([report])
    metric = metric_of(report)
    shown = [*files_of(report), *baseline_rows(report, metric)]
    entries = [(row, row["file"], row["file"], KINDS[row["kind"]]) for row in shown]
    return {
        "key": key,
        "name": name,
        "report": report,
        "metric": metric,
        "note": split_note(report),
        "formats": format_words(report),
        "headline": headline(report),
        "slower": slowdowns(report),
        "speed": [*kernel_notes(report), *missing_baselines(report)],
        "tiles": tiles(report),
        "columns": columns,
        "rows": rows,
        "tradeoffs": tradeoffs_of(key, metric, entries),
        "models": model_table(report),
        "zeros": zeros_table(report),
        "decoding": decoding_table(report),
        "decoding_notes": decoding_notes(report),
        "sparse": sparse_notes(report),
        "parity": [(row["file"], parity(row["verification"])) for row in files_of(report)],
        "stages": [_training(key, metric, stage) for stage in report["stages"]],
        "histograms": _histograms(key, report["rows"], max(4, HISTOGRAMS // runs)),
        "layers": _layers(key, [row for row in report["rows"] if row["layers"]], max(8, BARS // runs)),
    }


def merged_table(reports: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return a table of all runs with common headers; each cell is a value and the remark that follows it."""
    columns = list(dict.fromkeys(header for report in reports for header in headers(report)))
    columns.append(columns.pop(columns.index("parity")))
    rows = []
    for report in reports:
        for cells in comparison(report):
            by_header = dict(zip(headers(report), cells, strict=True))
            rows.append([_split(by_header.get(column, "-")) for column in columns])
    return columns, rows


def _split(cell: str) -> tuple[str, str]:
    value, _, remark = cell.partition(" (")
    return value, remark.removesuffix(")")


def baseline_rows(report: dict[str, Any], metric: Metric) -> list[dict[str, Any]]:
    """Return the baselines as rows of a figure, with their metric in the runtime."""
    judged = {"kind": "post-training", "verification": report["rows"][0]["verification"]}
    return [
        {**row, **judged, "file": row["name"], f"test_{metric.name}": row["runtime_metric"]}
        for row in report["baselines"]
        if not row["failure"]
    ]


Entry = tuple[dict[str, Any], str, str, str]  # row of a report, label, words, colour


def tradeoffs_of(key: str, metric: Metric, entries: Sequence[Entry]) -> list[Picture]:
    """Draw the metric versus size, and versus latency for each batch size.

    Files whose metric is NaN or infinite are left out; without any other file, there are no figures.
    """
    entries = [entry for entry in entries if math.isfinite(metric.of(entry[0]))]
    if not entries:
        return []

    def point(entry: Entry, cost: float, low: float, high: float) -> Point:
        row, label, words, colour = entry
        samples = row["verification"]["samples"]
        return Point(label, words, row["kind"], colour, cost, low, high, metric.of(row), samples)

    mega = max(row["bytes"] for row, *_ in entries) >= 2e6
    divisor, unit = (1e6, "MB") if mega else (1e3, "kB")
    sizes = [point(entry, *[entry[0]["bytes"] / divisor] * 3) for entry in entries]
    pictures = [
        Picture(f"{metric.title} versus size", "", tradeoff(f"{key}-size", sizes, metric, "size on disk", unit))
    ]
    for batch in dict.fromkeys(latency["batch_size"] for row, *_ in entries for latency in row["latency"]):
        points = [
            point(entry, latency["median_ms"], latency["low_ms"], latency["high_ms"])
            for entry in entries
            for latency in entry[0]["latency"]
            if latency["batch_size"] == batch
        ]
        svg = tradeoff(f"{key}-latency{batch}", points, metric, f"latency, batch of {batch}", "ms")
        pictures.append(Picture(f"{metric.title} versus latency, batch of {batch}", "", svg))
    return pictures


def _training(key: str, metric: Metric, stage: dict[str, Any]) -> dict[str, Any]:
    pictures = []
    for kind, curves in curve_groups(stage["curves"]).items():
        svg = training_curves(
            f"{key}-{stage['stage']}-{kind}", stage["stage"], kind, curves, stage["curves"]["resumed_at"]
        )
        pictures.append(Picture(GROUPS.get(kind, kind), "", svg))
    value = stage["metrics"].get(f"val/{metric.name}")
    measured = "no validation data" if value is None else f"validation {metric.name} {metric.show(value)}"
    return {**stage, "pictures": pictures, "measured": measured}


def _histograms(key: str, rows: Sequence[dict[str, Any]], drawn: int) -> list[dict[str, Any]]:
    """Draw histograms for stages that trained quantized weights, or for all quantized stages if none did."""
    with_weights = [row for row in rows if row["histograms"]]
    trained = [row for row in with_weights if row["kind"] == "trained"]
    return [_stage_histograms(key, row, drawn) for row in trained or with_weights]


def _stage_histograms(key: str, row: dict[str, Any], drawn: int) -> dict[str, Any]:
    by_name = {layer["name"]: layer for layer in row["layers"]}
    shown = largest(list(row["histograms"]), [row], drawn)
    pictures = []
    for index, name in enumerate(name for name in shown if name in row["histograms"]):
        after, before = row["histograms"][name]["after"], row["histograms"][name]["before"]
        svg = weight_histogram(f"{key}-{row['stage']}-weights{index}", name, before, after, row["kind"])
        was = f"{clipped_fraction(before):.1%} → " if before else ""
        note = f"error {by_name[name]['weight_error']:.1%} · clipped {was}{clipped_fraction(after):.1%}"
        pictures.append(Picture(f"{name} · {after['bits']} bits", note, svg))
    return {"stage": row["stage"], "kind": row["kind"], "pictures": pictures, "layers": len(row["histograms"])}


def _layers(key: str, rows: Sequence[dict[str, Any]], drawn: int) -> dict[str, Any] | None:
    if not rows:
        return None
    count = max(len(row["layers"]) for row in rows)
    return {
        "rows": rows,
        "wide": layer_picture(f"{key}-layers-wide", rows, drawn, wide=True),
        "tall": layer_picture(f"{key}-layers-tall", rows, drawn, wide=False),
        "note": f"Only the {drawn} largest of {count} layers are shown." if count > drawn else "",
    }
