"""`qatkit profile`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, AsJson, Overrides
from qatkit.cli.output import echo, print_table
from qatkit.cli.phases import load_phases
from qatkit.cli.traced import check_trace, print_trace, run_trace
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from rich.table import Table

    from qatkit.advise.devices import Device
    from qatkit.advise.phases import Phases
    from qatkit.advise.roofline import LayerCost

SHOWN = 12
"""Layers in the table."""


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A recipe, or a folder with the config.json of a transformers model.")
    ],
    overrides: Overrides = None,
    device: Annotated[
        str,
        typer.Option(
            help="Name of a device, such as a100, h100, l4, rtx4090 or raspberry-pi-5, or local for this machine."
        ),
    ] = "local",
    batch: Annotated[int, typer.Option(min=1, help="Samples or sequences per call.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per sequence of a language model, at most its number of positions.",
            show_default="2048",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="The dtype of the uncompressed model.", show_default="the faster of fp32 and bf16"),
    ] = None,
    drawn: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the roofline with the layers as points to an SVG file."),
    ] = None,
    traced: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Run training steps with torch.profiler, and write a Chrome trace (.json)."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="The stage to trace.", show_default="the last one that trains"),
    ] = None,
    allow: Allow = None,
    as_json: AsJson = False,
) -> None:
    """Find a model's bottleneck on a device, and the largest speedup of each technique.

    The roofline model compares each layer's arithmetic and memory traffic with the device's peak rate and memory
    bandwidth. Its times are lower bounds. Weights are not read, except with --trace, which runs training steps on this
    machine.

    Example: qatkit profile llm/int4_qat --device a100 --context 4096
    """
    from qatkit.advise.devices import DEVICES
    from qatkit.advise.local import local_device

    chosen = local_device() if device == "local" else DEVICES.row(device, "--device")
    base = dtype or chosen.fastest
    from qatkit.advise.roofline import BYTES, call_seconds, rate_of

    if base not in BYTES:
        raise QatkitError(f"unknown dtype '{base}'", key="--dtype", advice=f"use one of: {', '.join(BYTES)}")
    rate_of(chosen, base)
    check_trace(model, traced, stage)
    phases = load_phases(model, overrides, batch, context, allow or [])
    measured = run_trace(model, overrides or [], traced, stage, allow or []) if traced is not None else None
    if drawn is not None:
        _draw(drawn, phases, chosen, base)
    if as_json:
        found = {} if measured is None else {"trace": asdict(measured)}
        echo(json.dumps({**_content(phases, chosen, base), **found}))
        return
    ridge = rate_of(chosen, base) * 1e3 / chosen.bandwidth
    echo(
        f"{chosen.name}: {rate_of(chosen, base):.3g} TFLOP/s in {base}, {chosen.bandwidth:.4g} GB/s, so layers below "
        f"{ridge:.3g} FLOP/byte are memory-bound ({chosen.source})"
    )
    for phase, layers in phases.items():
        if phase == "training":  # three times the operations and bytes of each layer
            echo(f"training step without the optimizer: at least {_time(call_seconds(layers, chosen, base))}")
        else:
            print_table(_layers(phase, layers, chosen, base))
    print_table(_techniques(phases, chosen, base))
    if measured is not None and traced is not None:
        print_trace(measured, traced)


def _draw(path: Path, phases: Phases, device: Device, dtype: str) -> None:
    from qatkit.common.files import write_atomically
    from qatkit.report.page import missing_packages

    if (missing := missing_packages()) is not None:
        raise QatkitError(missing, key="--picture", advice="or remove the option")
    from qatkit.report.roofline import picture

    write_atomically(path, picture(phases, device, dtype))


def _layers(phase: str, layers: Sequence[LayerCost], device: Device, dtype: str) -> Table:
    from rich.table import Table

    from qatkit.advise.roofline import bound_of, call_seconds, in_caches, intensity_of, seconds
    from qatkit.common.units import format_bytes, format_count

    total, device = call_seconds(layers, device, dtype), in_caches(device, layers, dtype)
    table = Table(title=f"{phase}: at least {_time(total)}")
    for header in ("layers", "type", "parameters", "FLOPs", "bytes", "FLOP/byte", "bound by", "time", "fraction"):
        table.add_column(header, overflow="fold")

    def add(name: str, same: Sequence[LayerCost], kind: str = "", intensity: str = "", bound: str = "") -> float:
        spent = sum(seconds(layer, device, dtype) for layer in same)
        table.add_row(
            name, kind, format_count(sum(layer.weights for layer in same)),
            format_count(sum(layer.flops for layer in same)),
            format_bytes(round(sum(layer.bytes(8 * _bytes_of(dtype), dtype) for layer in same))),
            intensity, bound, _time(spent), f"{spent / total:.1%}",
        )  # fmt: skip
        return spent

    groups = _alike(layers)
    groups.sort(key=lambda group: -sum(seconds(layer, device, dtype) for layer in group[1]))
    for name, same in groups[:SHOWN]:
        first = same[0]
        add(name, same, first.kind, f"{first.intensity(dtype):.3g}", bound_of(first, device, dtype))
    if rest := [layer for _, same in groups[SHOWN:] for layer in same]:
        add(f"{len(rest)} others", rest)
    if device.call:
        cells = ("starting the call", "", "", "", "", "", "", _time(device.call), f"{device.call / total:.1%}")
        table.add_row(*cells)
    table.add_section()
    counts = [sum(numbers) for numbers in zip(*((each.weights, each.flops) for each in layers), strict=True)]
    moved = format_bytes(round(sum(layer.bytes(8 * _bytes_of(dtype), dtype) for layer in layers)))
    intensity = f"{intensity_of(layers, dtype):.3g}"
    table.add_row("total", "", *map(format_count, counts), moved, intensity, "", _time(total), "100.0%")
    return table


def _alike(layers: Sequence[LayerCost]) -> list[tuple[str, list[LayerCost]]]:
    """Layers that differ only in the numbers of their names, such as the same layer of every block."""
    groups: dict[tuple[Any, ...], list[LayerCost]] = {}
    for layer in layers:
        key = (re.sub(r"\d+", "*", layer.name), layer.kind, layer.weights, layer.flops, layer.activations)
        groups.setdefault(key, []).append(layer)
    return [
        (f"{key[0]} ({len(same)} layers)" if len(same) > 1 else same[0].name or "(model)", same)
        for key, same in groups.items()
    ]


def _techniques(phases: Phases, device: Device, dtype: str) -> Table:
    from rich.table import Table

    served = {phase: layers for phase, layers in phases.items() if phase != "training"}
    table = Table(title="upper bounds of the speedup by technique")
    for header in ("technique", *served):
        table.add_column(header)
    for name, ratios in _speedups(served, device, dtype).items():
        table.add_row(name, *(f"{ratio:.2f}x" if ratio is not None else "not supported" for ratio in ratios.values()))
    return table


def _speedups(phases: Phases, device: Device, dtype: str) -> dict[str, dict[str, float | None]]:
    """How many times faster each technique makes each phase at most; None if the device does not support it."""
    from qatkit.advise.roofline import TECHNIQUES, call_seconds, supports

    def ratio(layers: Sequence[LayerCost], technique: Any) -> float | None:
        if not supports(device, dtype, technique):
            return None
        return call_seconds(layers, device, dtype) / call_seconds(layers, device, dtype, technique)

    return {each.name: {phase: ratio(layers, each) for phase, layers in phases.items()} for each in TECHNIQUES}


def _content(phases: Phases, device: Device, dtype: str) -> Mapping[str, Any]:
    from qatkit.advise.roofline import bound_of, call_seconds, in_caches, seconds

    near = {phase: in_caches(device, layers, dtype) for phase, layers in phases.items()}
    return {
        "device": asdict(device),
        "dtype": dtype,
        "phases": {
            phase: [
                {
                    **asdict(layer),
                    "bytes": layer.bytes(8 * _bytes_of(dtype), dtype),
                    "intensity": layer.intensity(dtype),
                    "bound": bound_of(layer, near[phase], dtype),
                    "seconds": seconds(layer, near[phase], dtype),
                }
                for layer in layers
            ]
            for phase, layers in phases.items()
        },
        "seconds": {phase: call_seconds(layers, device, dtype) for phase, layers in phases.items()},
        "speedup": _speedups(phases, device, dtype),
    }


def _bytes_of(dtype: str) -> float:
    from qatkit.advise.roofline import BYTES

    return BYTES[dtype]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
