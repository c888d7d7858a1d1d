"""Dense export: a plain safetensors checkpoint with fake-quantized weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.export.interface import EXACT, Bound, ExportContext, Measured, PlannedExport, ReadBack, Walk
from qatkit.export.walking import walk_modules
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.parts import QATParts
from qatkit.quantization.prepare import quantized_weights, strip_qat
from qatkit.quantization.state import quantizer_prefixes, quantizer_state
from qatkit.spec import QuantSpec


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if tied weights are quantized differently; all other models are supported.

    Raises:
        QatkitError: layers that share one weight quantize it differently, or only some of them do.
    """
    owners: dict[int, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), key)
        specs = [_weight_spec(planned, name.rpartition(".")[0]) for name in (first, key)]
        if specs[0] != specs[1]:
            raise _tied(first, key)


def _weight_spec(planned: PlannedExport, layer: str) -> QuantSpec | None:
    scheme = planned.schemes.get(layer)
    return None if scheme is None else scheme.weight


def _tied(first: str, second: str) -> QatkitError:
    return QatkitError(
        f"'{first}' and '{second}' share one tied weight but quantize it differently, and a plain model cannot store "
        "both results",
        advice="quantize both layers with the same spec, or exclude both",
    )


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a dense file; `context` is not used."""
    export_dense(model, path)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Load a dense file into the plain model and compare every tensor."""
    return load_and_compare(model, path, load_file)


def bound(measured: Measured) -> Bound:
    """Return the error bound: 0, or none if activations are quantized, because a dense file does not quantize them."""
    if measured.quantizes_inputs:
        return Bound("none, since the file does not quantize activations", None)
    return EXACT


def walk(model: nn.Module, path: Path, runtime: nn.Module) -> Walk:
    """Walk through the layers of a file; the plain model with its values computes what it should compute."""
    plain = copy.deepcopy(model)
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    return walk_modules(plain, path, runtime)


def is_dense(path: Path) -> bool:
    """Whether a safetensors file contains plain tensors rather than the sparse format."""
    return "sparse" not in metadata(path)


def export_dense(model: nn.Module, path: Path | str) -> None:
    """Export a model's weights with plain names; weights of quantized layers are fake-quantized.

    A plain model that loads the file has exactly the trained weights, in their own dtype. Activation quantization is
    not stored, because it is not a property of the weights. The metadata entry ``specs`` lists the quantized layers and
    their specs.

    Args:
        model: A plain model, or one prepared by `prepare_qat`.
        path: The safetensors file, which is written atomically. Tied weights are written once per name.

    Raises:
        QatkitError: tied layers quantize their common weight differently, so no single value is correct for both.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_dense(model, Path(folder) / "model.safetensors")
        ...     torch.equal(load_file(Path(folder) / "model.safetensors")["0.weight"], model[0].fake_quantized_weight())
        True
    """
    tensors = dense_state(model)
    specs = quantizer_state(model)[1]
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "specs": json.dumps(specs)})


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dense checkpoint by plain name, on the CPU, without shared memory.

    Raises:
        QatkitError: tied layers quantize their common weight differently.
    """
    own = quantizer_prefixes(model)
    tensors = {
        key: full_tensor(value).detach().cpu().contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(own)
    }
    owner: dict[int, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):  # a shared layer's weight appears under each name
        if not isinstance(layer, QATLayer | QATParts):
            continue
        with torch.no_grad():
            shipped = layer.shipped()
        for part, value in shipped.items():
            tensors[f"{name}.{part}" if name else part] = full_tensor(value).detach().cpu().contiguous().clone()
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key not in tensors:
            continue
        first = owner.setdefault(id(parameter), key)
        if not torch.equal(tensors[first], tensors[key]):
            raise _tied(first, key)
    return tensors


@torch.no_grad()
def load_and_compare(model: nn.Module, path: Path, load: Callable[[Path], dict[str, Tensor]]) -> ReadBack:
    """Load a file's tensors into the plain model, and compare them to the trained model.

    Args:
        model: The trained model, on the CPU.
        path: The file.
        load: Reads the state dict from the file.
    """
    loaded = copy.deepcopy(model)
    strip_qat(loaded)
    expected = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(model))
    for name, layer in model.named_modules(remove_duplicate=False):  # a shared layer appears under each name
        if isinstance(layer, QATLayer | QATParts):
            expected |= {f"{name}.{part}" if name else part: value for part, value in layer.shipped().items()}
    try:
        loaded.load_state_dict(load(path), strict=True)
    except (RuntimeError, KeyError, SafetensorError, QatkitError) as error:
        return ReadBack(weights, [f"{path.name} cannot be loaded into the plain model: {error}"], None)
    failures = []
    for key, tensor in loaded.state_dict().items():
        wrong = (tensor != expected[key]) & ~(tensor.isnan() & expected[key].isnan())
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            failures.append(f"'{key}': {int(wrong.sum())} of {wrong.numel()} values differ, the first at {first}")
    return ReadBack(weights, failures, loaded)


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if there is none or the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
