"""What a report says in sentences: the result of a run, and what parity means."""

from __future__ import annotations

from typing import Any, TypedDict

from qatkit.export.formats import FORMATS
from qatkit.report.metrics import Metric, metric_of
from qatkit.tasks.table import TASKS


class Parity(TypedDict):
    """Whether a file computes what training computed."""

    passed: bool
    headline: str
    sentences: list[str]


class Tile(TypedDict):
    """A number at the head of a run."""

    label: str
    value: str
    note: str
    state: str
    """good, bad, or empty."""


def parity(check: dict[str, Any]) -> Parity:
    """The verification of one file, for a reader who knows none of its terms.

    Args:
        check: ``verification`` of a row of the report.
    """
    row = FORMATS.row(check["format"], "verification.format")
    if not check["passed"]:
        return Parity(
            passed=False,
            headline=f"{row.runtime} does NOT compute what training computed. Do not ship this file.",
            sentences=check["failures"],
        )
    sentences = []
    if check["layers"]:
        weights = f"{check['weights']:,} {row.weights} in {check['layers']} layers"
        sentences.append(f"Every one of the {weights} of the file is the trained one.")
    sentences.append(_difference(check))
    same = round(check["agreement"] * check["samples"])
    whom = "every one" if same == check["samples"] else f"{same:,}"
    task = TASKS.row(check["task"], "report.json")
    sentences.append(f"Both name the same {task.agreement} for {whom} of {check['samples']:,} {task.counted}.")
    return Parity(passed=True, headline=f"{row.runtime} computes what training computed.", sentences=sentences)


def _difference(check: dict[str, Any]) -> str:
    error, effect = check["mean_error"], check["quantization_error"]
    if error == 0:
        return "Its outputs are equal to the last bit."
    text = f"Its outputs differ by {plain(error)} on average"
    if check["allowed_error"] is None:
        return f"{text}, since this format does not round activations; they are not held to a bound."
    limit = f"more than {plain(check['allowed_error'])} would fail"
    if effect == 0:
        return f"{text}: the noise of floating-point sums in another order ({limit})."
    return f"{text}, {_part(error / effect)} of what quantization itself changes ({plain(effect)}; {limit})."


def _part(ratio: float) -> str:
    if ratio > 0.5:
        return f"{ratio:.2g} times"
    inverse = 1 / ratio
    return f"1/{float(f'{inverse:.2g}'):,.0f}"


def plain(number: float) -> str:
    """Two significant digits as people write them: 0.000036, and 8e-7 where the zeros would be counted.

    Example:
        >>> plain(3.6e-05), plain(0.346)
        ('0.000036', '0.35')
    """
    if number == 0:
        return "0"
    mantissa, exponent = f"{number:.1e}".split("e")
    if int(exponent) < -5:
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{float(f'{number:.2g}'):.{max(0, 1 - int(exponent))}f}"


def headline(report: dict[str, Any]) -> str:
    """A run's result in one sentence: its last row against its first."""
    first, last, metric = report["rows"][0], report["rows"][-1], metric_of(report)
    was, now = metric.show(metric.of(first)), metric.show(metric.of(last))
    if last is first:
        return f"{now} test {metric.name} in {kilobytes(last['bytes'])}; nothing was compressed."
    smaller = first["bytes"] / last["bytes"]
    size = f"{smaller:.1f} times smaller than" if smaller >= 1 else f"{1 / smaller:.1f} times larger than"
    if max(smaller, 1 / smaller) < 1.05:
        size = "about as large as"
    judged = f"the same test {metric.name} ({now})" if now == was else f"{now} test {metric.name} instead of {was}"
    return (
        f"{size} the {first['kind']} model ({kilobytes(last['bytes'])} instead of {kilobytes(first['bytes'])}), "
        f"at {judged}."
    )


def kilobytes(size: int) -> str:
    """A file's size in kB or MB, of 1000."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def tiles(report: dict[str, Any]) -> list[Tile]:
    """The numbers at the head of a run: its last row against its first, and parity over all rows."""
    first, last = report["rows"][0], report["rows"][-1]
    alone, metric = last is first, metric_of(report)
    samples = last["verification"]["samples"]
    note = f"one of {samples:,} test samples is {1 / samples:.2%}"
    if not metric.percent:
        note = f"over {samples:,} test tokens, a loss of {last['test_loss']:.3f} nats each"
    if not alone:
        note = f"{_change(metric, metric.of(first), metric.of(last))} {first['stage']}; {note}"
    found = [
        Tile(label=f"{metric.name} of {last['stage']}", value=metric.show(metric.of(last)), note=note, state=""),
        Tile(
            label="size on disk" if alone else "smaller on disk",
            value=kilobytes(last["bytes"]) if alone else f"{first['bytes'] / last['bytes']:.2f}x",
            note="" if alone else f"{kilobytes(first['bytes'])} → {kilobytes(last['bytes'])}",
            state="",
        ),
    ]
    for then, now in zip(first["latency"], last["latency"], strict=True):
        before, after = then["median_ms"], now["median_ms"]
        found.append(
            Tile(
                label=f"{'latency' if alone else 'speed'}, batch of {now['batch_size']}",
                value=f"{after:.3g} ms" if alone else f"{before / after:.2f}x",
                note=f"{'' if alone else f'{before:.3g} → '}{after:.3g} ms, threads: {now['threads']}",
                state="",
            )
        )
    failed = [row["stage"] for row in report["rows"] if not row["verification"]["passed"]]
    found.append(
        Tile(
            label="training and runtime agree",
            value="FAILED" if failed else "verified",
            note=f"{', '.join(failed)}: see below"
            if failed
            else f"all {len(report['rows'])} files, reloaded from disk",
            state="bad" if failed else "good",
        )
    )
    return found


def _change(metric: Metric, was: float, now: float) -> str:
    if now == was:
        return "the same as"
    return f"{100 * (now - was):+.2f} points to" if metric.percent else f"{now / was - 1:+.2%} against"
