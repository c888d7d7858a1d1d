"""`qatkit bench`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, AsJson, RunArgument
from qatkit.cli.inputs import open_run
from qatkit.cli.output import echo, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from qatkit.pipeline.serving import Bench


class Against(StrEnum):
    """The baseline with which exported files are compared."""

    ptq = "ptq"


def command(
    run: RunArgument,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=2**20, metavar="N", help="A batch size. Repeatable.", show_default="1 and 64"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Number of threads that the runtime uses.")] = 1,
    against: Annotated[
        Against | None,
        typer.Option(help="Also measure the dense model quantized by the runtime's own post-training quantization."),
    ] = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, load time, memory and size of exported files.

    The first lines compare the last stage with the dense model, and with post-training quantization if --against is
    set. If the last stage is slower, they say so and list the layers that are not quantized.

    Example: qatkit bench runs/digits_int8 --batch 1 --batch 16 --against ptq
    """
    this = open_run(run, allow, [])
    from qatkit.pipeline.serving import bench_run

    sizes = list(dict.fromkeys(batch or [1, 64]))
    measured = bench_run(this, sizes, threads, against is not None)
    if as_json:
        echo(json.dumps(_content(measured, sizes, threads)))
        return
    for line in headlines(measured, sizes):
        echo(line)
    print_table(_table(measured, sizes))


def headlines(measured: Bench, sizes: list[int]) -> list[str]:
    """Sentences that compare the last stage with the dense model and with post-training quantization."""
    from dataclasses import asdict

    from qatkit.report.serving import speedup
    from qatkit.report.speed import float_words

    last, lines, slower = measured.last, [], False
    for other in dict.fromkeys([measured.dense, *measured.baselines]):
        if other is None or other == last:
            continue
        ratios = {
            size: speedup(measured.served[other].seconds[size], measured.served[last].seconds[size]) for size in sizes
        }
        behind = min(ratio.high for ratio in ratios.values()) < 1
        slower |= behind
        words = ", ".join(
            f"{ratio.median:.2f}x at batch size {size} ({ratio.low:.2f} to {ratio.high:.2f})"
            for size, ratio in ratios.items()
        )
        size_ratio = measured.served[last].bytes / measured.served[other].bytes
        lines.append(
            f"{'SLOWER: ' if behind else ''}speed of {last} relative to {other}: {words}; size: {size_ratio:.2f}x"
        )
    lines.sort(key=lambda line: not line.startswith("SLOWER"))
    if slower:
        kernels = asdict(measured.kernels[last])
        floating = float_words(kernels) if kernels["floating"] else "none"
        packed = ", ".join(f"{count} {kind}" for kind, count in kernels["weight_only"].items())
        weight_only = f"with packed weights and floating-point inputs: {packed}; " if packed else ""
        lines.append(f"matrix products in floating point: {floating}; {weight_only}{measured.coverage}")
    return lines


def _table(measured: Bench, sizes: list[int]) -> Table:
    from rich.table import Table

    table = Table()
    head = ["file", "size", "load", "memory"]
    for header in [*head, *(f"{what}, batch {size}" for size in sizes for what in ("p50", "p95", "samples/s"))]:
        table.add_column(header, overflow="fold")
    for name, file in measured.served.items():
        cells = [
            name,
            f"{file.bytes / 1e3:.1f} kB",
            f"{file.load_seconds * 1e3:.1f} ms",
            "unknown" if file.resident_bytes is None else f"{file.resident_bytes / 1e6:.1f} MB",
        ]
        for size in sizes:
            cells += [f"{file.percentile(size, percent) * 1e3:.3g} ms" for percent in (50, 95)]
            cells.append(f"{file.throughput(size):.4g}")
        table.add_row(*cells)
    return table


def _content(measured: Bench, sizes: list[int], threads: int) -> dict[str, object]:
    from dataclasses import asdict

    from qatkit.report.serving import speedup

    others = [name for name in measured.served if name != measured.last]
    return {
        "threads": threads,
        "files": {
            name: {
                "bytes": file.bytes,
                "load_s": file.load_seconds,
                "resident_bytes": file.resident_bytes,
                "kernels": asdict(measured.kernels[name]),
                "latency": [
                    {
                        "batch_size": size,
                        "p50_ms": file.percentile(size, 50) * 1e3,
                        "p95_ms": file.percentile(size, 95) * 1e3,
                        "samples_per_s": file.throughput(size),
                    }
                    for size in sizes
                ],
            }
            for name, file in measured.served.items()
        },
        "speedup": {
            name: {
                size: asdict(speedup(measured.served[name].seconds[size], measured.served[measured.last].seconds[size]))
                for size in sizes
            }
            for name in others
        },
    }
