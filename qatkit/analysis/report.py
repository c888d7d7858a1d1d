"""The comparison, as a table for the terminal and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = ["stage", "what", "test accuracy", "in the runtime", "size", "latency", "parity"]


def terminal_table(report: dict[str, Any]) -> Table:
    """The comparison as a `rich` table."""
    from rich.table import Table

    table = Table(title=f"{report['name']}: dense, post-training and trained ({report['format']})")
    for header in HEADERS:
        table.add_column(header, overflow="fold")
    for cells in comparison(report):
        table.add_row(*cells)
    return table


def comparison(report: dict[str, Any]) -> list[list[str]]:
    """The cells of the comparison, a list per row under `HEADERS`."""
    first = report["rows"][0]
    rows = []
    for row in report["rows"]:
        check = row["verification"]
        layers = row["layers"]
        bits = sorted({f"w{layer['weight_bits']}a{layer['activation_bits']}" for layer in layers})
        rows.append(
            [
                row["stage"],
                f"{row['kind']} {' '.join(bits)}".strip(),
                f"{row['test_accuracy']:.2%}",
                f"{check['runtime_metric']:.2%}" if check["runtime_metric"] is not None else "-",
                f"{row['bytes'] / 1000:.1f} kB ({first['bytes'] / row['bytes']:.2f}x smaller)",
                ", ".join(_latency(now, then) for now, then in zip(row["latency"], first["latency"], strict=True)),
                "passed" if check["passed"] else "FAILED",
            ]
        )
    return rows


def _latency(now: dict[str, Any], first: dict[str, Any]) -> str:
    ratio = first["median_ms"] / now["median_ms"]
    return f"batch {now['batch_size']}: {now['median_ms']:.3f} ms ({ratio:.2f}x faster)"


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown: the comparison, what was verified, and every layer."""
    lines = [f"# {report['name']}", "", *_table(HEADERS, comparison(report)), ""]
    lines += ["Accuracies are of the held-out test split. Size is that of the file on disk.", "", "## Parity", ""]
    for row in report["rows"]:
        lines.append(f"- **{row['stage']}**: {row['verification']['text']}")
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
    return "\n".join([*lines, "", f"Made with {versions}, {report['machine']['threads']} threads.", ""])


def _table(headers: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(headers) + " |",
        "|" + " --- |" * len(headers),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
