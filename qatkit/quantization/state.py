"""Save and load the quantizers of a model: specs, scales and zero points, bit for bit."""

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
from qatkit.quantization.kv_cache import add_kv_quantizers
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.parts import QATParts
from qatkit.quantization.placement.points import Placement, place, placement_of, point_parts
from qatkit.quantization.prepare import set_fast_paths, share_quantizers, swap_layer
from qatkit.spec import QuantSpec

Specs = dict[str, dict[str, dict[str, Any]]]
_SUFFIX = "_fake_quant"
_NOWHERE = Placement()


def quantizer_state(model: nn.Module) -> tuple[dict[str, Tensor], Specs]:
    """Collect the scales, zero points and specs of a prepared model, by layer.

    Returns:
        Tensors named ``{layer}.{part}.scale`` and ``{layer}.{part}.zero_point`` (float32, CPU; none for dynamic
        activations), where the part is "weight", "input" or, in layers with multiple weights, the name of a weight,
        such as "q_proj", or of its input, "q_proj_input". Two-level scales add ``{layer}.{part}.outer_scale``; the
        zero points of specs with minima are these. The specs are returned as ``{layer}: {part: spec}``.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for part, fake_quant in _parts(module).items():
            kept: dict[str, Tensor] = {}
            if fake_quant.outer_scale is not None:
                kept["outer_scale"] = full_tensor(fake_quant.outer_scale)
            if not fake_quant.dynamic:
                # the weight is gathered only where its scale is computed from it
                x = full_tensor(_weight(module, part)) if fake_quant.computed else torch.empty(0)
                kept["scale"], kept["zero_point"] = fake_quant.whole_qparams(x)
            for key, tensor in kept.items():
                tensors[f"{name}.{part}.{key}"] = tensor.detach().cpu().contiguous().clone()
    return tensors, layer_specs(model)


def layer_specs(model: nn.Module) -> Specs:
    """Return the specs of a prepared model as plain data, ``{layer}: {part: fields}``."""
    specs = {
        name: {
            part: asdict(fake_quant.spec)
            for part, fake_quant in _parts(module).items()
            if part not in point_parts(module)
        }
        for name, module in model.named_modules()
    }
    return {name: parts for name, parts in specs.items() if parts}


def prepare_from_specs(model: nn.Module, specs: Specs, placement: Placement = _NOWHERE) -> None:
    """Prepare a plain model in place from its `layer_specs` and its `placement_of`, without scales."""
    for name, parts in specs.items():
        by_part = {part: QuantSpec(**fields) for part, fields in parts.items()}
        if "key" in by_part:
            add_kv_quantizers(name, model.get_submodule(name), by_part["key"])
            continue
        inputs = next((spec for part, spec in by_part.items() if part.endswith("input")), None)
        weight = next((spec for part, spec in by_part.items() if not part.endswith("input")), None)
        swap_layer(model.get_submodule(name), weight, inputs)
    share_quantizers(model, list(specs), static=False)
    place(model, placement)
    set_fast_paths(model)


def _parts(module: nn.Module) -> dict[str, FakeQuantize]:
    """Return the fake quantizers of one module by part: weight, input, key, value, ..."""
    return {
        name.removesuffix(_SUFFIX): child for name, child in module._modules.items() if isinstance(child, FakeQuantize)
    }


def _weight(module: nn.Module, part: str) -> Tensor:
    if isinstance(module, QATParts):
        return module.matrix(part)
    assert isinstance(module, QATLayer)
    return module.matrix


def quantizer_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the state-dict prefixes of fake quantizers, for every name of a shared layer."""
    return tuple(
        f"{name}.{attribute}."
        for name, module in model.named_modules(remove_duplicate=False)
        for attribute, child in module._modules.items()
        if isinstance(child, FakeQuantize)
    )


def save_quantizers(model: nn.Module, path: Path) -> None:
    """Write the quantizers of a prepared model to a safetensors file, with the specs as metadata."""
    tensors, specs = quantizer_state(model)
    metadata = {"specs": json.dumps(specs)}
    if (placement := placement_of(model)).points:
        metadata["placement"] = json.dumps(placement.as_dict())
    save_file(tensors, path, metadata=metadata)


def load_quantizers(model: nn.Module, path: Path) -> list[str]:
    """Prepare a plain model with the specs and scales from a file, in place.

    Returns:
        The names of the prepared layers.

    Raises:
        QatkitError: A scale computed from the weights differs from the recorded scale, so the file was written for
            different weights; or the file has tensors without a place, so another version wrote it.
    """
    with safe_open(path, framework="pt") as file:
        specs = json.loads(file.metadata()["specs"])
        placed = file.metadata().get("placement")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    placement = Placement() if placed is None else Placement.from_dict(json.loads(placed))
    prepare_from_specs(model, specs, placement)
    for name in dict.fromkeys([*specs, *(point.module for point in placement.points)]):
        module = model.get_submodule(name)
        for part, fake_quant in _parts(module).items():
            kept = {key: tensors.pop(f"{name}.{part}.{key}", None) for key in ("scale", "zero_point", "outer_scale")}
            if kept["scale"] is None or kept["zero_point"] is None:
                if kept["outer_scale"] is not None:
                    fake_quant.set_outer_scale(kept["outer_scale"])
                continue
            if kept["scale"].isnan().any():
                raise QatkitError(
                    f"the {part} of layer '{name}' has no scale, because it was saved before calibration",
                    key=path.name, advice="calibrate the model and save it again",
                )  # fmt: skip
            if not fake_quant.computed:
                fake_quant.set_qparams(kept["scale"], kept["zero_point"], kept["outer_scale"])
            elif not torch.equal(fake_quant.qparams(_weight(module, part).detach())[0].cpu(), kept["scale"]):
                raise QatkitError(
                    f"the weight of layer '{name}' does not match its recorded scale", key=path.name,
                    advice="load the weights that were saved with this file",
                )  # fmt: skip
    if tensors:
        raise QatkitError(
            f"the quantizers of this version do not have {', '.join(sorted(tensors)[:3])}"
            f"{f' and {len(tensors) - 3} more' if len(tensors) > 3 else ''}, which another version wrote",
            key=path.name, advice="save the quantizers again",
        )  # fmt: skip
    return list(specs)
