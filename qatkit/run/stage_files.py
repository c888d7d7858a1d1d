"""The files of a finished stage; if the process is killed, either all or none of them exist.

stage/model/model.safetensors   plain weights under plain names
stage/quantizers.safetensors    scales, zero points and specs, if layers are quantized
stage/adapter/                  LoRA's adapters in peft's format, if there are any
stage/logs/*/metrics.csv        training curves of every attempt
stage/stage.json                written last: a stage with this file is finished; it contains the digests of the others
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qatkit.common.files import atomic_path, sha256_of
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.folding import replay_folds
from qatkit.quantization.state import load_quantizers, quantizer_prefixes, save_quantizers
from qatkit.run.record import StageRecord, read_record, write_record

_LOGS = "logs/"
"""The folder of the training curves: a report reads them, and no result depends on them."""


def save_stage(folder: Path, model: nn.Module, record: StageRecord) -> None:
    """Write a finished stage: weights, quantizers, then the record that marks it as finished."""
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
    files = {path.relative_to(folder).as_posix(): path for path in _files_of(folder)}
    for path in files.values():  # the adapter is not written here, and must be on the disk before the record
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_record(folder, dataclasses.replace(record, files={name: sha256_of(path) for name, path in files.items()}))


def _files_of(folder: Path) -> list[Path]:
    """The files that later commands read, without the record."""
    parts = [*(folder / "model").iterdir(), folder / "quantizers.safetensors", *folder.glob("adapter/*")]
    return sorted(path for path in (*parts, *folder.glob(f"{_LOGS}*/metrics.csv")) if path.is_file())


def check_files(folder: Path, record: StageRecord) -> None:
    """Compare the files of a finished stage, except its logs, to the digests in its record.

    Raises:
        QatkitError: a file is missing or has changed.
    """
    for name, digest in record.files.items():
        if name.startswith(_LOGS):
            continue
        path = folder / name
        advice = "restore the file, or use `qatkit run --force` to rerun the stage"
        if not path.is_file():
            raise QatkitError(f"{path} is missing", advice=advice)
        if sha256_of(path) != digest:
            raise QatkitError(f"{path} has changed since stage '{record.name}' was finished", advice=advice)


def check_logs(folder: Path, record: StageRecord) -> None:
    """Compare the logs of a finished stage to the digests in its record; a missing log only causes a warning.

    Raises:
        QatkitError: a log file has changed.
    """
    for name, digest in record.files.items():
        path = folder / name
        if not name.startswith(_LOGS):
            continue
        if not path.is_file():
            warnings.warn(f"{path} is missing, so the report lacks its curves", QatkitWarning, stacklevel=2)
        elif sha256_of(path) != digest:
            raise QatkitError(
                f"{path} has changed since stage '{record.name}' was finished",
                advice="restore the file, or delete it to omit its curves from the report",
            )


def _untied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tied weights: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    copies = {}
    for key, value in tensors.items():
        copies[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return copies


def count_zeros(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Count the weights that are exactly zero in each layer."""
    layers = {name: model.get_submodule(name) for name in names}
    return {name: int((cast(torch.Tensor, layer.weight) == 0).sum()) for name, layer in layers.items()}


def measured_zeros(folder: Path) -> dict[str, list[int]]:
    """Count the zeros and the elements in the saved weight of each layer whose pruned weights stay zero."""
    record = _finished(folder)
    names = record.zeros
    with safe_open(folder / "model" / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(f"{name}.weight") for name in names}
    return {name: [int((weight == 0).sum()), weight.numel()] for name, weight in weights.items()}


def load_stage(folder: Path, model: nn.Module, quantizers: bool) -> StageRecord:
    """Load a finished stage into a newly built model, in place.

    Args:
        folder: The stage's folder.
        model: A model built from the architecture in the stage's record. The default architecture is the recipe's
            model.
        quantizers: Whether to fake-quantize the model again if it was fake-quantized in the stage.

    Raises:
        QatkitError: the stage is not finished, one of its files has changed, its weights do not match the model, or
            their number of zeros differs from the recorded number.
    """
    record = _finished(folder)
    replay_folds(model, record.folds)
    try:
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"), strict=True)
    except RuntimeError as error:
        raise QatkitError(
            f"the weights in {folder / 'model'} do not match the recipe's model: {error}",
            advice="use --force to rerun the stage",
        ) from error
    if (zeros := count_zeros(model, record.zeros)) != record.zeros:
        name = next(name for name in zeros if zeros[name] != record.zeros[name])
        raise QatkitError(
            f"layer '{name}' in {folder / 'model'} has {zeros[name]} zeros, but {record.zeros[name]} were recorded",
            advice="restore the file, or use --force to rerun the stage",
        )
    if quantizers and "quantizers.safetensors" in record.files:
        load_quantizers(model, folder / "quantizers.safetensors")
    return record


def _finished(folder: Path) -> StageRecord:
    """The record of a finished stage whose files have not changed."""
    record = read_record(folder)
    if record is None:
        raise QatkitError(
            f"stage '{folder.name}' is not finished: {folder / 'stage.json'} does not exist",
            advice="use `qatkit run` to finish the stage",
        )
    check_files(folder, record)
    return record
