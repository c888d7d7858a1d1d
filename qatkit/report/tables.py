"""Compare the stages of a run in a table for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qatkit.export.formats import FORMATS
from qatkit.report.decoding import HEADERS as DECODING
from qatkit.report.decoding import cells as decoding_cells
from qatkit.report.metrics import PERPLEXITY, metric_of
from qatkit.report.sentences import not_run_in
from qatkit.report.speed import kernel_notes, missing_baselines, slowdowns

if TYPE_CHECKING:
    from rich.table import Table

    from qatkit.tasks.metrics import Metric


def headers(report: dict[str, Any]) -> list[str]:
    """Return the columns of the comparison, including one for each measured batch size."""
    speed = [f"batch of {size}" for size in _sizes(report)]
    judged = f"test {metric_of(report).name}"
    return ["stage", "kind", judged, "in the runtime", *_language_headers(report), "size", *speed, "parity"]


def files_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all exported files: the stages in the main format, then those in the other formats."""
    return [*report["rows"], *report["others"]]


def _sizes(report: dict[str, Any]) -> list[int]:
    """The batch sizes whose latency was measured."""
    return list(dict.fromkeys(each["batch_size"] for row in files_of(report) for each in row["latency"]))


def _language_headers(report: dict[str, Any]) -> list[str]:
    """Columns for the results of the recipe's ``evaluate`` block."""
    measured = report["rows"][0].get("language")
    if not measured:
        return []
    seen = f"context {measured['context']}, stride {measured['stride']}"
    return [f"perplexity, {seen}", "agreement with dense", "KL to dense", *measured["tasks"]]


def _language_cells(row: dict[str, Any]) -> list[str]:
    measured = row.get("language")
    if not measured:
        return []
    shown = f"{PERPLEXITY.show(measured['perplexity'])} (loss {measured['loss']:.4f})"
    tasks = (f"{value:.4f}" for value in measured["tasks"].values())
    return [shown, f"{measured['agreement']:.2%}", f"{measured['kl']:.4f}", *tasks]


def comparison(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the comparison by row, in the order of `headers`; ratios are relative to the first row."""
    first, metric = report["rows"][0], metric_of(report)
    rows = []
    for row in files_of(report):
        check, main = row["verification"], row["format"] == report["format"]
        loss = f" (loss {row['test_loss']:.4f})" if metric is PERPLEXITY else ""
        bits = sorted({f"w{layer['weight_bits']}a{layer['activation_bits']}" for layer in row["layers"]})
        language = _language_cells(row) if main else ["-" for _ in _language_headers(report)]
        rows.append(
            [
                row["file"],
                " ".join(word for word in (row["kind"], row.get("adapters"), *bits) if word),
                metric.show(metric.of(row)) + loss,
                _runtime_metric(check, metric),
                *language,
                f"{row['bytes'] / 1000:.1f} kB" + _ratio(first["bytes"] / row["bytes"], "smaller", row is first),
                *_latency_cells(report, row),
                _parity(check),
            ]
        )
    return rows + [_baseline_cells(report, row) for row in report["baselines"] if not row["failure"]]


def _runtime_metric(check: dict[str, Any], metric: Metric) -> str:
    if check["runtime_metric"] is None or not_run_in(check):
        return "did not run"
    return metric.show(check["runtime_metric"])


def _parity(check: dict[str, Any]) -> str:
    if not check["passed"]:
        return "FAILED"
    return f"passed ({not_run} did not run)" if (not_run := not_run_in(check)) else "passed"


def _latency_cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """One cell per batch size, with the speed relative to the first row if that was measured."""
    first = report["rows"][0]
    own, then = ({each["batch_size"]: each["median_ms"] for each in part["latency"]} for part in (row, first))
    cells = []
    for size in _sizes(report):
        ratio = _ratio(then[size] / own[size], "speed", row is first) if size in own and size in then else ""
        cells.append(f"{own[size]:.3f} ms{ratio}" if size in own else "-")
    return cells


def _baseline_cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The cells of a file that the runtime quantized itself; there is no trained model to compare it to."""
    first, runtime = report["rows"][0], FORMATS.row(report["format"], "report.json").runtime
    return [
        row["name"],
        f"PTQ by {runtime}",
        "-",
        metric_of(report).show(row["runtime_metric"]),
        *("-" for _ in _language_headers(report)),
        f"{row['bytes'] / 1000:.1f} kB" + _ratio(first["bytes"] / row["bytes"], "smaller", False),
        *_latency_cells(report, row),
        "-",
    ]


def model_table(report: dict[str, Any]) -> list[list[str]]:
    """Return a header and one row per stage with the cost of its model; empty if all models have the same size."""
    rows = report["rows"]
    if not all("torch_ms" in row.get("cost", {}) for row in rows):
        return []
    first = rows[0]["cost"]
    table = [["stage", "parameters", "MACs per sample", "latency in PyTorch, one sample"]]
    for row in rows:
        cost, itself = row["cost"], row is rows[0]
        table.append(
            [
                row["stage"],
                f"{cost['parameters']}" + _ratio(first["parameters"] / cost["parameters"], "fewer", itself),
                f"{cost['macs']}" + _ratio(first["macs"] / cost["macs"], "fewer", itself),
                f"{cost['torch_ms']:.3f} ms" + _ratio(first["torch_ms"] / cost["torch_ms"], "speed", itself),
            ]
        )
    return table


def zeros_table(report: dict[str, Any]) -> list[list[str]]:
    """Return a header, the total, and one row per layer with a mask; empty if there are no such layers."""
    rows = [row for row in report["rows"] if row.get("zeros")]
    layers = dict.fromkeys(layer for row in rows for layer in row["zeros"])
    if not layers:
        return []

    def sparsity(counts: Iterable[tuple[int, int]]) -> str:
        zeros, weights = map(sum, zip(*counts, strict=True))
        return f"{zeros / weights:.2%}"

    table = [["layer", *(row["stage"] for row in rows)]]
    table.append([f"all {len(layers)} layers", *(sparsity(row["zeros"].values()) for row in rows)])
    for layer in layers:
        table.append([layer, *(sparsity([row["zeros"][layer]]) if layer in row["zeros"] else "-" for row in rows)])
    return table


def sparse_notes(report: dict[str, Any]) -> list[str]:
    """For every sparse file, return a sentence that compares its size with dense storage."""
    return [
        f"{row['file']}: the file takes {row['bytes'] / 1000:.1f} kB, {row['bytes'] / row['dense_bytes']:.1%} of the "
        f"{row['dense_bytes'] / 1000:.1f} kB that the same weights take in dense storage"
        for row in files_of(report)
        if row.get("dense_bytes")
    ]


def decoding_table(report: dict[str, Any]) -> list[list[str]]:
    """Return the speed of language models, with headers; empty if `qatkit bench` has not measured it."""
    found = {row["file"]: row["decoding"] for row in files_of(report) if row.get("decoding")}
    return [list(DECODING), *(decoding_cells(name, file) for name, file in found.items())] if found else []


def decoding_notes(report: dict[str, Any]) -> list[str]:
    """Return sentences about the text of `decoding_table`, and the ratios to the dense model in the same runtime."""
    found = {row["file"]: row["decoding"] for row in files_of(report) if row.get("decoding")}
    texts = {
        f"A prompt of {file['prompt_tokens']} tokens and {file['new_tokens']} new tokens, one text at a time, "
        f"{file['threads']} thread{'s' * (file['threads'] != 1)}: medians, with quartiles in parentheses."
        for file in found.values()
    }
    return [*sorted(texts)] + [
        f"{name} relative to {file['relative_to']}: "
        + ", ".join(
            f"{what} {each['median']:.2f}x ({each['low']:.2f} to {each['high']:.2f})"
            for what, each in file["speedup"].items()
        )
        for name, file in found.items()
        if "speedup" in file
    ]


def split_note(report: dict[str, Any]) -> str:
    """Return a sentence about the data on which the metrics were measured."""
    if metric_of(report).percent:
        return "Accuracy is measured on the held-out test split."
    note = "Perplexity and loss (nats per token) are measured on the held-out test split; lower is better."
    if measured := report["rows"][0].get("language"):
        note += (
            f" Context {measured['context']}, stride {measured['stride']}: windows of {measured['context']} tokens "
            f"advance by {measured['stride']} tokens. Each token is predicted once, from at least "
            f"{measured['context'] - measured['stride']} preceding tokens if the text contains that many. Agreement is "
            "the fraction of tokens with the same top-1 prediction. KL is KL(dense || row) in nats per token."
        )
    return note


def _ratio(ratio: float, word: str, itself: bool) -> str:
    return "" if itself else f" ({ratio:.2f}x {word})"


def format_words(report: dict[str, Any]) -> str:
    """Return the names of the export formats, the main one first.

    Example:
        >>> format_words({"rows": [{"format": "onnx"}], "others": [{"format": "openvino"}, {"format": "dense"}]})
        'onnx, openvino and dense'
    """
    *first, last = dict.fromkeys(row["format"] for row in files_of(report))
    return f"{', '.join(first)} and {last}" if first else last


def terminal_table(report: dict[str, Any]) -> Table:
    """Return the comparison as a `rich` table."""
    from rich.table import Table

    table = Table(title=f"{report['name']} ({format_words(report)})")
    for header in headers(report):
        table.add_column(header, overflow="fold")
    for cells in comparison(report):
        table.add_row(*cells)
    return table


def markdown(report: dict[str, Any]) -> str:
    """Return the complete report as Markdown: comparison, verification, and all layers."""
    lines = [f"# {report['name']}", "", *_table(headers(report), comparison(report)), ""]
    lines += [f"{split_note(report)} Size is the exported file's size on disk.", "", "## Parity", ""]
    for row in files_of(report):
        lines.append(f"- **{row['file']}**: {row['verification']['text']}")
    if table := model_table(report):
        lines += ["", "## Models", "", *_table(table[0], table[1:])]
    if table := zeros_table(report):
        lines += ["", "## Sparsity", "", *_table(table[0], table[1:]), "", "Zeros are counted in the saved weights."]
    if notes := sparse_notes(report):
        lines += ["", "## Sparse storage", "", *(f"- {note}" for note in notes)]
    if notes := [*slowdowns(report), *kernel_notes(report), *missing_baselines(report)]:
        lines += ["", "## Speed", "", *(f"- {note}" for note in notes)]
    if table := decoding_table(report):
        lines += ["", "## Prefill and decode", "", *_table(table[0], table[1:]), ""]
        lines += [f"- {note}" for note in decoding_notes(report)]
    for row in report["rows"]:
        if row["layers"]:
            lines += ["", f"## Layers of {row['stage']}", ""]
            lines += _table(
                [
                    "layer",
                    "weights",
                    "weight bits",
                    "activation bits",
                    "weight error",
                    "clipped",
                    "zeros",
                    "code bytes",
                ],
                [
                    [
                        f"`{layer['name']}`",
                        str(layer["weights"]),
                        str(layer["weight_bits"]),
                        str(layer["activation_bits"]),
                        f"{layer['weight_error']:.2%}",
                        f"{layer['clip_rate']:.2%}",
                        f"{layer['sparsity']:.2%}",
                        str(layer["code_bytes"]),
                    ]
                    for layer in row["layers"]
                ],
            )
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    threads = report["machine"]["threads"]
    return "\n".join([*lines, "", f"Generated with {versions}; {threads} thread{'s' * (threads != 1)}.", ""])


def _table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(headers) + " |",
        "|" + " --- |" * len(headers),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
