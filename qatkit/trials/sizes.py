"""The bytes of every format for every type of layer, measured on exported files."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkit.export.exporting import write_export
from qatkit.export.format_row import ExportFormat
from qatkit.export.interface import ExportContext
from qatkit.quantization.calibration import calibrate
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.records import Group, Sensitivity
from qatkit.quantization.prepare import fake_quantizers, prepare_qat
from qatkit.schemes import Scheme
from qatkit.tasks import call


@dataclass(frozen=True)
class Priced:
    """A sensitivity whose options have measured costs."""

    sensitivity: Sensitivity
    fixed: int
    """The part of the cost that does not depend on the formats."""
    notes: list[str]
    """What was measured."""


def sized(sensitivity: Sensitivity, kind: Callable[[str], str], size: Callable[[Mapping[str, Scheme]], int]) -> Priced:
    """Measure one file with all groups in their first format, and one for every other format of a type of layers.

    A format may store more than the packed codes: ONNX stores 2-bit codes of linear layers in 4 bits. The bytes that a
    candidate saves are therefore scaled, for each type of layers, to those that the file saves.

    Args:
        sensitivity: The measured loss increases, with the bytes of packed codes and scales.
        kind: The type of a layer by its name.
        size: The bytes of the file with these formats.
    """
    first = {group.name: next(iter(group.options)) for group in sensitivity.groups}
    kinds: dict[str, list[Group]] = {}
    for group in sensitivity.groups:
        kinds.setdefault(kind(group.layers[0]), []).append(group)
    whole = size(allocated_layers(sensitivity, first))
    fixed = whole - sum(group.options[first[group.name]].bytes for group in sensitivity.groups)
    options = {group.name: dict(group.options) for group in sensitivity.groups}
    notes: list[str] = []
    for layer_type, groups in kinds.items():
        for name in dict.fromkeys(name for group in groups for name in list(group.options)[1:]):
            own = [group for group in groups if name in group.options and first[group.name] != name]
            saved = sum(group.options[first[group.name]].bytes - group.options[name].bytes for group in own)
            if not saved:
                continue
            measured = whole - size(allocated_layers(sensitivity, first | {group.name: name for group in own}))
            for group in own:
                base, option = group.options[first[group.name]].bytes, group.options[name]
                options[group.name][name] = replace(
                    option, bytes=max(round(base - (base - option.bytes) * measured / saved), 0)
                )
            if abs(measured / saved - 1) > 0.1:
                notes.append(
                    f"{name} in {layer_type} layers saves {measured:,} bytes of the file, although its packed codes "
                    f"take {saved:,} bytes less"
                )
    groups = [replace(group, options=options[group.name]) for group in sensitivity.groups]
    return Priced(replace(sensitivity, groups=tuple(groups)), fixed, notes)


def exported_bytes(
    model: nn.Module, layers: Mapping[str, Scheme], select: Mapping[str, Sequence[str]], row: ExportFormat,
    context: ExportContext, exported: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> int:  # fmt: skip
    """Return the bytes of the file of a model in these formats, without training.

    Args:
        model: A model with plain layers, which is not changed.
        layers: Formats by glob.
        select: ``include`` and ``exclude`` of `prepare_qat`.
        row: The export format.
        context: Inputs of the format; its batch calibrates static scales.
        exported: Returns the part of the model that is exported.
    """
    own = copy.deepcopy(model).eval()
    prepare_qat(own, layers=layers, include=select["include"], exclude=select["exclude"])
    if not all(fake_quant.ready for _, fake_quant in fake_quantizers(own)):
        calibrate(own, [context.batch], lambda batch: call(own, batch))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path: Any = row.path(Path(folder) / "draft")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_export(row, exported(own), path, context)
        return row.size(path)
