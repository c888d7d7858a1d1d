"""Read back a compressed-tensors folder: codes and scales from the file, dequantized weights from transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.export.interface import ReadBack
from qatkit.export.transformers_folder import compare_tensors, load_folder, quietly
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers, quantized_weights
from qatkit.quantization.state import quantizer_prefixes


@torch.no_grad()
def compare_and_load(trained: nn.Module, folder: Path) -> ReadBack:
    """Compare a folder's codes, scales and dequantized weights to a model, and load it with transformers.

    Args:
        trained: The model, in eval mode on the CPU.
        folder: A folder written by `export_compressed`.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            return ReadBack(weights, [f"{file.name} cannot be read: {error}"], None)
    failures: list[str] = []
    own = quantizer_prefixes(trained)
    expected = {key: value for key, value in trained.state_dict().items() if not key.startswith(own)}
    for name, layer in qat_layers(trained):
        assert layer.weight_fake_quant is not None
        packed = tensors.get(f"{name}.weight_packed")
        stored = tensors.get(f"{name}.weight")
        if packed is not None:
            shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
            stored = unpack_from_int32(packed, layer.weight_fake_quant.spec.num_bits, shape)
        scale, zero_point = layer.weight_fake_quant.qparams(layer.matrix)
        codes = quantize(layer.matrix, scale, zero_point, layer.weight_fake_quant.spec)
        failures += compare_tensors(f"{name}.weight", "codes", stored, codes)
        failures += compare_tensors(f"{name}.weight_scale", "scales", tensors.get(f"{name}.weight_scale"), scale)
        if (inputs := layer.input_fake_quant) is not None and not inputs.dynamic:
            stored = tensors.get(f"{name}.input_scale")
            failures += compare_tensors(f"{name}.input_scale", "scales", stored, _static_scale(inputs))
        expected |= {f"{name}.{part}": value for part, value in layer.shipped().items()}
    try:
        loaded = _load(folder)
    except Exception as error:  # the exceptions of transformers share no base class
        reason = " ".join(str(error).split())[:300]
        return ReadBack(weights, [*failures, f"transformers cannot load {folder.name}: {reason}"], None)
    decoded = loaded.state_dict()
    for key, value in expected.items():
        failures += compare_tensors(key, "values", decoded.get(key), value)
    return ReadBack(weights, failures, loaded)


def _load(folder: Path) -> nn.Module:
    loaded = load_folder(folder)
    if (quantizer := getattr(loaded, "hf_quantizer", None)) is not None:
        with quietly():
            quantizer.compressor.decompress_model(loaded)  # else the first forward pass would
    return loaded


def _static_scale(fake_quant: FakeQuantize) -> Tensor:
    return fake_quant.qparams(torch.empty(0))[0]
