"""What a finished stage leaves on disk, written so that a killed process leaves either all of it or none.

stage/model/model.safetensors   plain weights under plain names
stage/quantizers.safetensors    scales, zero points and specs, where layers are quantized
stage/stage.json                written last: a stage is finished when it is there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.folding import Fold, replay_folds
from qatkit.quantization.state import load_quantizers, quantizer_prefixes, save_quantizers
from qatkit.run.architecture import Architecture


@dataclass(frozen=True)
class StageRecord:
    """The content of ``stage.json``."""

    name: str
    fingerprint: str
    inputs: dict[str, Any]
    """What the result depends on: dotted recipe keys and their values."""
    folds: list[Fold] = field(default_factory=list)
    """Pairs of convolution and BatchNorm that were folded, in this stage or before."""
    zeros: dict[str, int] = field(default_factory=dict)
    """Weights that are zero in every layer whose zeros are held, counted in the saved weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    """``parameters``, and ``macs``: multiply-adds for one sample of the test split."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    architecture: Architecture | None = None
    """What the model is built from, where that is not the recipe's model."""
    early_stopping: dict[str, Any] | None = None
    """Where the block is on: whether it ``stopped`` the stage, after how many ``steps``, and the best validation: its
    ``best_step`` and ``val/loss``."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_stage(folder: Path, model: nn.Module, record: StageRecord) -> None:
    """Write a finished stage: weights, quantizers, then the record that makes it valid."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "quantizers.safetensors").unlink(missing_ok=True)
    (folder / "model").mkdir(parents=True)
    quantizer_keys = quantizer_prefixes(model)
    plain = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(quantizer_keys)
    }
    save_file(_untied(plain), folder / "model" / "model.safetensors")
    if quantizer_keys:
        save_quantizers(model, folder / "quantizers.safetensors")
    for path in folder.rglob("*.safetensors"):  # what the record vouches for must be on the disk before it
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_atomically(folder / "stage.json", json.dumps(asdict(record), indent=1))


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory: a tied weight is written once per name."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        apart[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def read_record(folder: Path) -> StageRecord | None:
    """The record of a finished stage, or None if the stage is not finished."""
    path = folder / "stage.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["folds"] = [(conv, bn) for conv, bn in content["folds"]]
        if content.get("architecture") is not None:
            content["architecture"] = Architecture.from_plain(content["architecture"])
        return StageRecord(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise QatkitError(f"{path}: not a stage record ({error}); delete the folder to run the stage again") from error


def count_zeros(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Weights that are exactly zero, for each of the named layers."""
    layers = {name: model.get_submodule(name) for name in names}
    return {name: int((cast(torch.Tensor, layer.weight) == 0).sum()) for name, layer in layers.items()}


def measured_zeros(folder: Path) -> dict[str, list[int]]:
    """Of every layer whose zeros a finished stage holds: how many its saved weight has, and of how many."""
    record = read_record(folder)
    names = record.zeros if record is not None else {}
    with safe_open(folder / "model" / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(f"{name}.weight") for name in names}
    return {name: [int((weight == 0).sum()), weight.numel()] for name, weight in weights.items()}


def read_started(folder: Path) -> dict[str, Any]:
    """What a stage that is not finished was started with; empty if it was not started."""
    try:
        content: dict[str, Any] = json.loads((folder / "started.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise QatkitError(f"{folder / 'started.json'}: not readable ({error}); delete the folder {folder}") from error
    if not {"inputs", "fingerprint"} <= set(content):
        raise QatkitError(f"{folder / 'started.json'}: it lacks what the stage was started with; delete {folder}")
    return content


def load_stage(folder: Path, model: nn.Module, quantizers: bool) -> StageRecord:
    """Load a finished stage into a freshly built model, in place.

    Args:
        folder: The stage's folder.
        model: What the stage's record says it is built from: by default the recipe's model, as its factory makes it.
        quantizers: Whether the model is to be fake-quantized again where the stage was.

    Raises:
        QatkitError: the stage is not finished, its weights do not fit the model, or their zeros are not those recorded.
    """
    record = read_record(folder)
    if record is None:
        raise QatkitError(f"stage '{folder.name}' is not finished: {folder / 'stage.json'} does not exist")
    replay_folds(model, record.folds)
    try:
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"), strict=True)
    except RuntimeError as error:
        raise QatkitError(f"{folder / 'model'}: the weights do not fit the recipe's model: {error}") from error
    if (zeros := count_zeros(model, record.zeros)) != record.zeros:
        name = next(name for name in zeros if zeros[name] != record.zeros[name])
        raise QatkitError(
            f"{folder / 'model'}: layer '{name}' has {zeros[name]} zeros, and {record.zeros[name]} are recorded; the "
            "file was changed: delete the folder to run the stage again"
        )
    if quantizers and (folder / "quantizers.safetensors").exists():
        load_quantizers(model, folder / "quantizers.safetensors")
    return record
