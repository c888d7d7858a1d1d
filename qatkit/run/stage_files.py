"""The files of a finished stage, written so that a killed process leaves all of them or none.

stage/model/model.safetensors   plain weights under plain names
stage/quantizers.safetensors    scales, zero points and specs, if layers are quantized
stage/stage.json                written last: a stage with this file is finished
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.quantization.folding import replay_folds
from qatkit.quantization.state import load_quantizers, quantizer_prefixes, save_quantizers
from qatkit.run.record import StageRecord, read_record, write_record


def save_stage(folder: Path, model: nn.Module, record: StageRecord) -> None:
    """Write a finished stage: weights, quantizers, then the record that makes it finished."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "quantizers.safetensors").unlink(missing_ok=True)
    (folder / "model").mkdir(parents=True)
    quantizer_keys = quantizer_prefixes(model)
    plain = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(quantizer_keys)
    }
    with atomic_path(folder / "model" / "model.safetensors") as temporary:
        save_file(_untied(plain), temporary)
    if quantizer_keys:
        with atomic_path(folder / "quantizers.safetensors") as temporary:
            save_quantizers(model, temporary)
    write_record(folder, record)


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tied weights: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    copies = {}
    for key, value in tensors.items():
        copies[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return copies


def count_zeros(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The number of weights that are exactly zero in each of the named layers."""
    layers = {name: model.get_submodule(name) for name in names}
    return {name: int((cast(torch.Tensor, layer.weight) == 0).sum()) for name, layer in layers.items()}


def measured_zeros(folder: Path) -> dict[str, list[int]]:
    """The number of zeros and of weights in the saved weight of each layer whose zeros are held."""
    record = read_record(folder)
    names = record.zeros if record is not None else {}
    with safe_open(folder / "model" / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(f"{name}.weight") for name in names}
    return {name: [int((weight == 0).sum()), weight.numel()] for name, weight in weights.items()}


def load_stage(folder: Path, model: nn.Module, quantizers: bool) -> StageRecord:
    """Load a finished stage into a freshly built model, in place.

    Args:
        folder: The stage's folder.
        model: Built from the architecture in the stage's record, by default the recipe's model.
        quantizers: Whether to fake-quantize the model again if the stage did.

    Raises:
        QatkitError: the stage is not finished, its weights do not fit the model, or their zeros are not those recorded.
    """
    record = read_record(folder)
    if record is None:
        raise QatkitError(
            f"stage '{folder.name}' is not finished: {folder / 'stage.json'} does not exist",
            advice="use `qatkit run` to finish it",
        )
    replay_folds(model, record.folds)
    try:
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"), strict=True)
    except RuntimeError as error:
        raise QatkitError(
            f"the weights in {folder / 'model'} do not fit the recipe's model: {error}",
            advice="use --force to run the stage again",
        ) from error
    if (zeros := count_zeros(model, record.zeros)) != record.zeros:
        name = next(name for name in zeros if zeros[name] != record.zeros[name])
        raise QatkitError(
            f"layer '{name}' in {folder / 'model'} has {zeros[name]} zeros, but {record.zeros[name]} are recorded",
            advice="restore the file, or use --force to run the stage again",
        )
    if quantizers and (folder / "quantizers.safetensors").exists():
        load_quantizers(model, folder / "quantizers.safetensors")
    return record
