"""The quantizers of a model on disk: scales and zero points exactly as training used them, and their specs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.experts import QATExperts
from qatkit.quantization.kv_cache import add_kv_quantizers
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.prepare import set_fast_paths, share_quantizers, swap_layer
from qatkit.spec import QuantSpec

Specs = dict[str, dict[str, dict[str, Any]]]
_SUFFIX = "_fake_quant"


def quantizer_state(model: nn.Module) -> tuple[dict[str, Tensor], Specs]:
    """Scales and zero points of a prepared model, and its specs, by layer.

    Returns:
        Tensors named ``{layer}.{part}.scale`` and ``{layer}.{part}.zero_point`` (float32, CPU; none for dynamic
        activations), where the part is "weight", "input" or the name of an expert projection, with a
        ``{layer}.{part}.tensor_scale`` where scales have two levels; and the specs as ``{layer}: {part: spec}``.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for part, fake_quant in _parts(module).items():
            kept: dict[str, Tensor] = {}
            if fake_quant.tensor_scale is not None:
                kept["tensor_scale"] = full_tensor(fake_quant.tensor_scale)
            if not fake_quant.dynamic:
                # only a computed scale needs the weight, and only that is gathered for it
                x = full_tensor(_weight(module, part)) if fake_quant.computed else torch.empty(0)
                kept["scale"], kept["zero_point"] = fake_quant.whole_qparams(x)
            for key, tensor in kept.items():
                tensors[f"{name}.{part}.{key}"] = tensor.detach().cpu().contiguous().clone()
    return tensors, layer_specs(model)


def layer_specs(model: nn.Module) -> Specs:
    """The specs of a prepared model as plain data, ``{layer}: {part: fields}``."""
    specs = {
        name: {part: asdict(fake_quant.spec) for part, fake_quant in _parts(module).items()}
        for name, module in model.named_modules()
    }
    return {name: parts for name, parts in specs.items() if parts}


def prepare_from_specs(model: nn.Module, specs: Specs) -> None:
    """Prepare the layers of a plain model as recorded by `layer_specs`, in place; static scales wait to be set."""
    for name, parts in specs.items():
        by_part = {part: QuantSpec(**fields) for part, fields in parts.items()}
        if "key" in by_part:
            add_kv_quantizers(name, model.get_submodule(name), by_part["key"])
            continue
        inputs = by_part.pop("input", None)
        swap_layer(model.get_submodule(name), next(iter(by_part.values()), None), inputs)
    share_quantizers(model, list(specs), static=False)
    set_fast_paths(model)


def _parts(module: nn.Module) -> dict[str, FakeQuantize]:
    """The fake quantizers of one module, by what they quantize."""
    return {
        name.removesuffix(_SUFFIX): child for name, child in module._modules.items() if isinstance(child, FakeQuantize)
    }


def _weight(module: nn.Module, part: str) -> Tensor:
    if isinstance(module, QATExperts):
        return module.matrix(part)
    assert isinstance(module, QATLayer)
    return module.matrix


def quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the state-dict keys of fake quantizers start with, under every name that a shared layer has."""
    return tuple(
        f"{name}.{attribute}."
        for name, module in model.named_modules(remove_duplicate=False)
        for attribute, child in module._modules.items()
        if isinstance(child, FakeQuantize)
    )


def save_quantizers(model: nn.Module, path: Path) -> None:
    """Write the quantizers of a prepared model to a safetensors file, the specs in its metadata."""
    tensors, specs = quantizer_state(model)
    save_file(tensors, path, metadata={"specs": json.dumps(specs)})


def load_quantizers(model: nn.Module, path: Path) -> list[str]:
    """Prepare a plain model with the specs of the file and give it the file's scales, in place.

    Returns:
        The names of the prepared layers.

    Raises:
        QatkitError: a scale that is computed from the weights differs from the recorded one, which means that the
            weights are not those the file was written for.
    """
    with safe_open(path, framework="pt") as file:
        specs = json.loads(file.metadata()["specs"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    prepare_from_specs(model, specs)
    for name in specs:
        module = model.get_submodule(name)
        for part, fake_quant in _parts(module).items():
            found = {key: tensors.get(f"{name}.{part}.{key}") for key in ("scale", "zero_point", "tensor_scale")}
            if found["tensor_scale"] is not None:
                fake_quant.set_tensor_scale(found["tensor_scale"])
            if found["scale"] is None or found["zero_point"] is None:
                continue
            if found["scale"].isnan().any():
                raise QatkitError(
                    f"{path.name}: layer '{name}' has no scale for its {part}; it was saved before it was calibrated"
                )
            if not fake_quant.computed:
                fake_quant.set_qparams(found["scale"], found["zero_point"])
            elif not torch.equal(fake_quant.qparams(_weight(module, part).detach())[0].cpu(), found["scale"]):
                raise QatkitError(f"layer '{name}': its weight does not belong to the scales in {path.name}")
    return list(specs)
