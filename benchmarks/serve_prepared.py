"""Parts of `serve.py`: train a family and keep its files, with what is needed to judge their outputs."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from serve_files import write
from serve_network import call, parts
from torch import Tensor, nn

from qatkit.quantization import strip_qat
from qatkit.report.bench import Example

_DONE = "prepared.pt"


@dataclass(frozen=True)
class Prepared:
    """The files of a family, and the outputs that its trained models have in float64."""

    paths: Mapping[str, Mapping[str, str]]
    """Names of the files in the family's folder, by runtime and kind."""
    held_out: Example
    truth: Tensor
    """What the outputs are scored against: labels, or the embeddings of the float model."""
    exact: Mapping[str, Tensor]
    """Outputs of the quantized model in float64, by runtime."""
    error: Mapping[str, float]
    """Its mean quantization error, by runtime."""


def prepare(name: str, folder: Path, quick: bool) -> None:
    """Train a family and write its files into a folder, unless they are there."""
    if (folder / _DONE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    written = write(name, folder, quick)
    network = written.network
    found = {runtime: references(model, network.held_out) for runtime, model in written.trained.items()}
    prepared = Prepared(
        {runtime: {kind: path.name for kind, path in each.items()} for runtime, each in written.paths.items()},
        network.held_out,
        network.truth,
        {runtime: exact for runtime, (exact, _) in found.items()},
        {runtime: error for runtime, (_, error) in found.items()},
    )
    draft = folder / f"{_DONE}.tmp"
    torch.save(asdict(prepared), draft)
    os.replace(draft, folder / _DONE)


def load(folder: Path) -> Prepared:
    """The family that `prepare` left in a folder."""
    return Prepared(**torch.load(folder / _DONE))


@torch.no_grad()
def references(model: nn.Module, example: Example) -> tuple[Tensor, float]:
    """The outputs of a quantized model in float64, and its mean quantization error."""
    floating, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    strip_qat(floating)
    errors = [(call(model, part) - call(floating, part)).abs().mean() for part in parts(example)]
    doubles = parts(example.double()) if isinstance(example, Tensor) and example.is_floating_point() else parts(example)
    return torch.cat([call(exact, part) for part in doubles]), float(torch.stack(errors).mean())
