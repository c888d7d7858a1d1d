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
from qatkit.quantization.arithmetic import round_scale
from qatkit.quantization.modules import FakeQuantize, QATLayer, full_tensor
from qatkit.quantization.prepare import qat_layers, set_fast_paths, swap_layer
from qatkit.spec import QuantSpec

Specs = dict[str, dict[str, dict[str, Any]]]
_PARTS = {"weight": "weight_fake_quant", "input": "input_fake_quant"}


def quantizer_state(model: nn.Module) -> tuple[dict[str, Tensor], Specs]:
    """Scales and zero points of a prepared model, and its specs, by layer.

    Returns:
        Tensors named ``{layer}.weight.scale``, ``{layer}.weight.zero_point``, ``{layer}.input.scale``,
        ``{layer}.input.zero_point`` (float32, CPU; none for dynamic activations), and the specs as
        ``{layer}: {weight: spec, input: spec}``.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in qat_layers(model):
        for part, attribute in _PARTS.items():
            fake_quant: FakeQuantize | None = getattr(layer, attribute)
            if fake_quant is None or fake_quant.spec.dynamic:
                continue
            if fake_quant.computed:
                scale, zero_point = fake_quant.qparams(full_tensor(layer.weight))
            else:
                scale, zero_point = _stored(fake_quant)
            tensors[f"{name}.{part}.scale"] = scale.cpu().contiguous()
            tensors[f"{name}.{part}.zero_point"] = zero_point.cpu().contiguous()
    return tensors, layer_specs(model)


def layer_specs(model: nn.Module) -> Specs:
    """The specs of a prepared model as plain data, ``{layer}: {weight: fields, input: fields}``."""
    return {
        name: {
            part: asdict(fake_quant.spec)
            for part, attribute in _PARTS.items()
            if (fake_quant := getattr(layer, attribute)) is not None
        }
        for name, layer in qat_layers(model)
    }


def prepare_from_specs(model: nn.Module, specs: Specs) -> None:
    """Prepare the layers of a plain model as recorded by `layer_specs`, in place; static scales wait to be set."""
    for name, parts in specs.items():
        by_part = {part: QuantSpec(**fields) for part, fields in parts.items()}
        swap_layer(model.get_submodule(name), by_part.get("weight"), by_part.get("input"))
    set_fast_paths(model)


def _stored(fake_quant: FakeQuantize) -> tuple[Tensor, Tensor]:
    assert fake_quant.scale is not None
    assert fake_quant.zero_point is not None
    return round_scale(full_tensor(fake_quant.scale), fake_quant.spec), full_tensor(fake_quant.zero_point)


def quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the state-dict keys of fake quantizers start with, under every name that a shared layer has."""
    return tuple(
        f"{name}.{attribute}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QATLayer)
        for attribute in _PARTS.values()
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
        layer = model.get_submodule(name)
        for part, attribute in _PARTS.items():
            if (scale := tensors.get(f"{name}.{part}.scale")) is None:
                continue
            zero_point = tensors[f"{name}.{part}.zero_point"]
            fake_quant: FakeQuantize = getattr(layer, attribute)
            if not fake_quant.computed:
                fake_quant.set_qparams(scale, zero_point)
            elif not torch.equal(fake_quant.qparams(layer.weight.detach())[0].cpu(), scale):  # type: ignore[operator]
                raise QatkitError(f"layer '{name}': its weight does not belong to the scales in {path.name}")
    return list(specs)
