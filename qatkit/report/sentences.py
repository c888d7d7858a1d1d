"""Sentences for a report: the result of a run, and the verification of each file."""

from __future__ import annotations

import math
from typing import Any, TypedDict

from qatkit.common.units import format_bytes
from qatkit.export.formats import FORMATS
from qatkit.report.metrics import metric_of, task_of_report
from qatkit.tasks.metrics import Metric
from qatkit.tasks.table import TASKS


class Parity(TypedDict):
    """Sentences about the verification of one file."""

    passed: bool
    headline: str
    sentences: list[str]


class Tile(TypedDict):
    """A number at the top of a run's page."""

    label: str
    value: str
    note: str
    state: str
    """Either "good" or "bad", or empty."""


def parity(check: dict[str, Any]) -> Parity:
    """Describe the verification of one file in terms that require no background.

    Args:
        check: The ``verification`` of a row of the report.
    """
    row = FORMATS.row(check["format"], "verification.format")
    if not check["passed"]:
        return Parity(
            passed=False,
            headline=f"{check['runtime']} does NOT compute what training computed. Do not deploy this file.",
            sentences=check["failures"],
        )
    not_run = not_run_in(check)
    sentences = []
    if check["layers"]:
        weights = f"{check['weights']:,} {row.weights} in the file's {check['layers']} quantized layers"
        sentences.append(f"All {weights} equal the trained ones.")
    if not_run:
        advice = (
            f"To run {not_run}, use `qatkit verify --python`." if row.environment else f"{not_run} was not run here."
        )
        sentences.append(f"{check['runtime']} computed the outputs. {advice}")
    sentences.append(_difference(check))
    task = TASKS.row(check["task"], "report.json")
    samples, same = check["samples"], round(check["agreement"] * check["samples"])
    count = f"all {samples:,}" if same == samples else f"{same:,} of {samples:,}"
    sentences.append(f"Both models predict the same {task.agreement} for {count} {task.counted}.")
    headline = f"{check['runtime']} computes what training computed."
    if not_run:
        headline = f"The file contains what was trained, but {not_run} did not run."
    return Parity(passed=True, headline=headline, sentences=sentences)


def not_run_in(check: dict[str, Any]) -> str:
    """Return the file's runtime if verification did not run it, but computed the outputs with another program.

    Args:
        check: The ``verification`` of a row of the report.
    """
    runtime: str = check.get("not_run", "")  # reports of older versions do not have this key
    return runtime


def _difference(check: dict[str, Any]) -> str:
    error, effect = check["mean_error"], check["quantization_error"]
    if error == 0:
        return "Outputs are bit-identical."
    text = f"Outputs differ by {plain(error)} on average"
    if check["allowed_error"] is None:
        return f"{text}. No limit applies, because this format does not quantize activations."
    limit = f"the limit is {plain(check['allowed_error'])}"
    if effect == 0:
        return f"{text}, because of a different floating-point summation order ({limit})."
    return f"{text}, {_part(error / effect)} of the change due to quantization ({plain(effect)}; {limit})."


def _part(ratio: float) -> str:
    if ratio > 0.5:
        return f"{ratio:.2g} times"
    inverse = 1 / ratio
    return f"1/{float(f'{inverse:.2g}'):,.0f}"


def plain(number: float) -> str:
    """Format a number with two significant digits, such as 0.000036, or 8e-7 if there would be more zeros.

    Example:
        >>> plain(3.6e-05), plain(0.346)
        ('0.000036', '0.35')
        >>> plain(float("inf"))
        'inf'
    """
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    if int(exponent) < -5:
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{float(f'{number:.2g}'):.{max(0, 1 - int(exponent))}f}"


def headline(report: dict[str, Any]) -> str:
    """Summarize a run in one sentence: its last row compared with its first."""
    first, last, metric = report["rows"][0], report["rows"][-1], metric_of(report)
    was, now = metric.show(metric.of(first)), metric.show(metric.of(last))
    if last is first:
        return f"{now} test {metric.name} in {format_bytes(last['bytes'])}; nothing was compressed."
    smaller = first["bytes"] / last["bytes"]
    size = f"{smaller:.1f} times smaller than" if smaller >= 1 else f"{1 / smaller:.1f} times larger than"
    if max(smaller, 1 / smaller) < 1.05:
        size = "about as large as"
    judged = f"the same test {metric.name} ({now})" if now == was else f"{now} test {metric.name} instead of {was}"
    return (
        f"{size} the {first['kind']} model ({format_bytes(last['bytes'])} instead of {format_bytes(first['bytes'])}), "
        f"at {judged}."
    )


def tiles(report: dict[str, Any]) -> list[Tile]:
    """Return the numbers at the top of a run's page: the last row compared with the first, and parity of all rows."""
    first, last = report["rows"][0], report["rows"][-1]
    single, metric = last is first, metric_of(report)
    samples, task = last["verification"]["samples"], task_of_report(report)
    note = f"each of the {samples:,} {task.counted} accounts for {1 / samples:.2%}"
    if not metric.percent:
        loss = f", mean loss {last['test_loss']:.3f}" if "loss" in task.metrics else ""
        note = f"over {samples:,} {task.counted}{loss}"
    if not single:
        note = f"{_change(metric, metric.of(first), metric.of(last))} {first['stage']}; {note}"
    shown = [
        Tile(label=f"{metric.name} of {last['stage']}", value=metric.show(metric.of(last)), note=note, state=""),
        Tile(
            label="size on disk" if single else "smaller on disk",
            value=format_bytes(last["bytes"]) if single else f"{first['bytes'] / last['bytes']:.2f}x",
            note="" if single else f"{format_bytes(first['bytes'])} → {format_bytes(last['bytes'])}",
            state="",
        ),
    ]
    for then, now in zip(first["latency"], last["latency"], strict=True):
        before, after = then["median_ms"], now["median_ms"]
        shown.append(
            Tile(
                label=f"{'latency' if single else 'speed'}, batch of {now['batch_size']}",
                value=f"{after:.3g} ms" if single else f"{before / after:.2f}x",
                note=f"{'' if single else f'{before:.3g} → '}{after:.3g} ms, threads: {now['threads']}",
                state="",
            )
        )
    files = [*report["rows"], *report["others"]]
    return [*shown, _parity_tile(files)]


def _parity_tile(files: list[dict[str, Any]]) -> Tile:
    label = "parity of training and runtime"
    failed = [row["file"] for row in files if not row["verification"]["passed"]]
    if failed:
        return Tile(label=label, value="FAILED", note=f"see below: {', '.join(failed)}", state="bad")
    not_run = [row for row in files if not_run_in(row["verification"])]
    if not not_run:
        return Tile(label=label, value="verified", note=f"all {len(files)} files, reloaded from disk", state="good")
    runtimes = " and ".join(dict.fromkeys(not_run_in(row["verification"]) for row in not_run))
    names = ", ".join(row["file"] for row in not_run)
    return Tile(
        label=label,
        value="partly verified",
        note=f"all {len(files)} files, reloaded from disk; {runtimes} did not run: {names}",
        state="",
    )


def _change(metric: Metric, was: float, now: float) -> str:
    if now == was:
        return "the same as for"
    change = f"{100 * (now - was):+.2f} points" if metric.percent else f"{now / was - 1:+.2%}"
    return f"{change} compared with"
