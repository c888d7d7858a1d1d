"""A dense checkpoint that computes with the quantized weights wherever a plain model is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.experts import QATExperts
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.state import quantizer_prefixes, quantizer_state


def export_dense(model: nn.Module, path: Path | str) -> None:
    """Write a model's weights under plain names, those of quantized layers as the values that training computed with.

    A plain model that loads the file has exactly the trained weights, in their own dtype. The rounding of activations
    is not in the file: it is no property of a weight. The metadata's ``specs`` names the layers and their quantization.

    Args:
        model: A plain model, or one from `prepare_qat`.
        path: The safetensors file to write; appears whole or not at all. Tied weights are written once per name.

    Raises:
        QatkitError: a weight is shared by layers that quantize it differently, so that no single value is right.

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
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "specs": json.dumps(specs)})


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """What a dense checkpoint holds: tensors by plain name, on the CPU, none of them sharing memory.

    Raises:
        QatkitError: a weight is shared by layers that quantize it differently.
    """
    own = quantizer_prefixes(model)
    tensors = {
        key: full_tensor(value).detach().cpu().contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.startswith(own)
    }
    owner: dict[int, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):  # a shared layer's weight is under each name
        if not isinstance(layer, QATLayer | QATExperts):
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
            raise QatkitError(
                f"'{first}' and '{key}' are one tied weight, but they quantize it differently, so a plain model cannot "
                "hold both; quantize both with the same spec, or exclude both"
            )
    return tensors


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place at the end, or goes away if the block raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
