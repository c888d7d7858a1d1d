"""`qatkit bench`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, AsJson, Python, RunArgument
from qatkit.cli.inputs import open_run
from qatkit.cli.output import echo, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from qatkit.pipeline.bench import Decodings
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
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**20,
            metavar="N",
            help="Tokens that a language model reads.",
            show_default="128, or half of a shorter context",
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=2**20,
            metavar="N",
            help="Tokens that a language model writes.",
            show_default="32, or what a shorter context leaves",
        ),
    ] = None,
    python: Python = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Measure the speed, load time, memory and size of exported files in their runtimes.

    For causal language models: prefill and decode in tokens per second, and time to first token. For ONNX and OpenVINO
    files: latency and throughput. The first lines compare quantized files with the dense model. If a file is slower,
    they say so. The last lines name the files whose speed is not measured, with the reason.

    Example: qatkit bench runs/digits_int8 --batch 1 --batch 16 --against ptq
    """  # fmt: skip
    this = open_run(run, allow, [])
    from qatkit.pipeline.bench import Request, measure_speeds

    sizes = list(dict.fromkeys(batch)) if batch else None
    found = measure_speeds(this, Request(sizes, against is not None, prompt_tokens, new_tokens, threads, python))
    sizes = sizes or [1, 64]
    if as_json:
        latency = _content(found.latency, sizes) if found.latency else {}
        decoding = {"decoding": _decoding_content(found.decoding)} if found.decoding else {}
        echo(json.dumps({"threads": threads, **latency, **decoding, "not_measured": found.not_measured}))
        return
    if found.latency:
        for line in headlines(found.latency, sizes):
            echo(line)
        print_table(_table(found.latency, sizes))
    if found.decoding and found.decoding.files:
        from qatkit.report.decoding import comparison

        for line in comparison(found.decoding.files, found.decoding.dense):
            echo(line)
        print_table(_decoding_table(found.decoding, threads))
    for name, reason in found.not_measured.items():
        echo(f"not measured: {name}: {reason}")


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


def _decoding_table(measured: Decodings, threads: int) -> Table:
    from rich.table import Table

    from qatkit.report.decoding import HEADERS, cells

    table = Table(
        title=f"prompt of {measured.prompt_tokens} tokens, {measured.new_tokens} new tokens, one text at a time, "
        f"{threads} thread{'s' * (threads != 1)}"
    )
    for header in HEADERS:
        table.add_column(header, overflow="fold")
    for name, file in measured.files.items():
        table.add_row(*cells(name, file.content()))
    return table


def _decoding_content(measured: Decodings) -> dict[str, object]:
    from qatkit.report.decoding import content

    files = content(measured.files, measured.dense)
    return {"prompt_tokens": measured.prompt_tokens, "new_tokens": measured.new_tokens, "files": files}


def _content(measured: Bench, sizes: list[int]) -> dict[str, object]:
    from dataclasses import asdict

    from qatkit.report.serving import speedup

    others = [name for name in measured.served if name != measured.last]
    return {
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
