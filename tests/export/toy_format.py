"""An export format for tests: a pickled state dict. The table names these functions."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from qatkit import QatkitError
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.quantization.prepare import quantized_weights


def check(model: nn.Module, planned: PlannedExport) -> None:
    for name, scheme in planned.schemes.items():
        if scheme.weight is not None and scheme.weight.num_bits > 4:
            raise QatkitError(f"layer '{name}': toy files hold at most 4 bits", advice="set num_bits: 4")


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    torch.save(model.state_dict(), path)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(torch.load(path))
    return ReadBack(sum(weight.numel() for _, weight, _ in quantized_weights(model)), [], loaded)


def bound(measured: Measured) -> Bound:
    return Bound("a toy bound", 1e-6)
