"""The content of the MLX folder of a model: arrays by name, and the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qatkit.export.companions import export_config
from qatkit.export.dense import dense_state
from qatkit.export.mlx.architectures import sliding_window_pattern
from qatkit.export.mlx.packing import mode_of
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.prepare import qat_layers
from qatkit.spec import QuantSpec


def is_mlx_folder(path: Path) -> bool:
    """Whether a folder contains a model with the quantization of MLX."""
    config = path / "config.json"
    return config.is_file() and '"quantization":' in config.read_text(encoding="utf-8")


def quantized_layers(model: nn.Module) -> dict[str, QATLayer]:
    """Return the quantized layers whose weights the folder stores as codes, by name; a tied output layer is left out.

    MLX multiplies by the embedding if the config ties the output layer to it.
    """
    layers, seen = {}, set()
    for name, layer in qat_layers(model):
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            layers[name] = layer
    return layers


def weight_spec(layer: QATLayer) -> QuantSpec:
    """Return the quantization of a layer's weight."""
    assert layer.weight_fake_quant is not None
    return layer.weight_fake_quant.spec


@torch.no_grad()
def stored_arrays(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``model.safetensors`` by name, on the CPU."""
    arrays, tied = {}, set()
    first: dict[int, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), key) != key:
            tied.add(key)
    arrays = {key: value for key, value in dense_state(model).items() if key not in tied}
    for name, layer in quantized_layers(model).items():
        spec = weight_spec(layer)
        mode = mode_of(spec)
        assert mode is not None, "`check` refuses all other specs"
        matrix = full_tensor(layer.matrix)
        scale, zero_point = cast(Any, layer.weight_fake_quant).whole_qparams(matrix)
        codes = quantize(matrix, scale, zero_point, spec)
        parts = [part.cpu().numpy() for part in (codes.view(torch.uint8), scale, zero_point)]
        made = mode.arrays(parts[0].view("i1" if codes.dtype == torch.int8 else "u1"), parts[1], parts[2], spec)
        arrays |= {f"{name}.{suffix}": torch.from_numpy(array) for suffix, array in made.items()}
    return arrays


def quantization(model: nn.Module) -> dict[str, Any]:
    """Return the ``quantization`` of the config: the most frequent one, and that of every layer.

    Layers that are not listed are not quantized. The result is empty if no layer is.
    """
    layers = {}
    for name, layer in quantized_layers(model).items():
        spec = weight_spec(layer)
        layers[name] = {"group_size": spec.group_size, "bits": spec.num_bits, "mode": cast(Any, mode_of(spec)).name}
    kinds = list(layers.values())
    most = max(range(len(kinds)), key=lambda index: kinds.count(kinds[index]), default=0)
    return {**kinds[most], **layers} if kinds else {}


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the content of ``config.json``.

    mlx-lm silently uses its defaults for missing keys. Therefore, the base of the rotary embedding, which transformers
    keeps in ``rope_parameters``, and the order of a Gemma 3's layers are stored under the keys that mlx-lm reads.
    """
    config: dict[str, Any] = export_config(model).to_dict()
    config["architectures"] = [next(kind.__name__ for kind in type(model).__mro__ if hasattr(kind, "config_class"))]
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention")  # gemma 3 has one base for each kind of attention
    if local is not None:
        config["rope_local_base_freq"] = local["rope_theta"]
        config["sliding_window_pattern"] = sliding_window_pattern(model.config)
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    made = quantization(model)
    return config | ({"quantization": made, "quantization_config": made} if made else {})
