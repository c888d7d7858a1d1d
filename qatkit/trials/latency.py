"""The latency of every format for every kind of layer, measured in the runtime on exported files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from qatkit.quantization.mixed.overrides import allocated_layers, family_name
from qatkit.quantization.mixed.records import Group, Sensitivity
from qatkit.report.bench import Example, File, Latency, compare_files
from qatkit.trials.ladder import Rung
from qatkit.trials.sizes import Priced

REPEATS = 30


def timed(files: Mapping[str, Path], example: Example, batch: int, format: str) -> dict[str, Latency]:
    """Measure files in alternation, at one batch size and on one thread."""
    measured = compare_files({name: File(path, example, format) for name, path in files.items()}, (batch,), 1, REPEATS)
    return {name: rows[0] for name, rows in measured.items()}


Timer = Callable[[Mapping[str, Path]], Mapping[str, Latency]]
"""Measures files by name."""


def priced(sensitivity: Sensitivity, export: Callable[[Rung], Path], time: Timer) -> Priced:
    """Measure one file with all groups in their first format, and one for every other format of a kind of layers.

    Layers are of one kind if their names differ only in numbers and they have the same number of weights. The
    difference between two files is divided by the number of groups of the kind. A difference that is within the
    quartiles of both files is noise and counts as 0.

    Args:
        sensitivity: The measured loss increases.
        export: Exports the model in a choice of formats, without training.
        time: Measures files by name.
    """
    first = {group.name: next(iter(group.options)) for group in sensitivity.groups}
    kinds: dict[tuple[object, ...], list[Group]] = {}
    for group in sensitivity.groups:
        names = tuple(family_name(layer) for layer in group.layers)
        kinds.setdefault((names, group.weights, tuple(group.options)), []).append(group)
    choices: dict[tuple[str, str], dict[str, str]] = {}
    for groups in kinds.values():
        for name in list(groups[0].options)[1:]:
            choices[groups[0].name, name] = first | {group.name: name for group in groups}

    def file(formats: dict[str, str]) -> Path:
        return export(Rung(0, 0.0, formats, allocated_layers(sensitivity, formats)))

    files = {"": file(first)} | {"/".join(key): file(formats) for key, formats in choices.items()}
    latencies = time(files)
    base, notes, groups_out, fixed = latencies[""], list[str](), dict[str, Group](), 1e6 * latencies[""]["median_ms"]
    for groups in kinds.values():
        own = dict.fromkeys(groups[0].options, 0.0)
        for name in list(own)[1:]:
            found = latencies["/".join((groups[0].name, name))]
            difference = found["median_ms"] - base["median_ms"]
            noise = found["low_ms"] <= base["high_ms"] and base["low_ms"] <= found["high_ms"]
            own[name] = 0.0 if noise else 1e6 * difference / len(groups)
            kind = f"{len(groups)} x {groups[0].name}" if len(groups) > 1 else groups[0].name
            text = "no measurable difference" if noise else f"{difference:+.4f} ms"
            notes.append(f"{kind} in {name} instead of {next(iter(own))}: {text}")
        fastest = min(own.values())
        fixed += fastest * len(groups)
        for group in groups:
            options = {
                name: replace(option, bytes=round(own[name] - fastest)) for name, option in group.options.items()
            }
            groups_out[group.name] = replace(group, options=options)
    ordered = tuple(groups_out[group.name] for group in sensitivity.groups)
    return Priced(replace(sensitivity, groups=ordered), max(round(fixed), 1), notes)
