"""Read back a compressed-tensors folder: codes and scales from the file, dequantized weights from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.export.interface import ReadBack
from qatkit.export.transformers_folder import compare_tensors, load_folder, quietly
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.grids import grid_of
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers, quantized_weights
from qatkit.quantization.scales import tensor_scale_of
from qatkit.quantization.slices import value_range
from qatkit.quantization.state import quantizer_prefixes
from qatkit.spec import QuantSpec

_KINDS = {"weight_zero_point": "zero points"}
NVFP4 = "float8_e4m3fn"
"""The dtype of scales that are combined with a scale per tensor."""


def weight_scales(quantizer: FakeQuantize, matrix: Tensor) -> dict[str, Tensor]:
    """Return the numbers that the format stores with the codes of a weight, by name, on the CPU.

    NVFP4 has two scales: ``scale = weight_scale / weight_global_scale``.
    """
    scale, zero_point = (part.cpu() for part in quantizer.whole_qparams(matrix))
    if not quantizer.spec.symmetric:  # the codes of the format are signed
        return {"weight_scale": scale, "weight_zero_point": _signed(zero_point, quantizer.spec)}
    if quantizer.spec.scale_dtype != NVFP4:
        return {"weight_scale": scale}
    outer = quantizer.outer_scale
    if outer is None:
        low, high = value_range(matrix, quantizer.spec)
        outer = tensor_scale_of(torch.maximum(-low, high), quantizer.spec)
    outer = outer.cpu()
    return {"weight_scale": (scale * outer).to(torch.float8_e4m3fn).float(), "weight_global_scale": outer}


@torch.no_grad()
def compare_and_load(trained: nn.Module, folder: Path) -> ReadBack:
    """Compare a folder's codes, scales and dequantized weights to a model, and load it with transformers.

    Args:
        trained: The model, in eval mode on the CPU.
        folder: A folder written by `export_compressed`.
    """
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
        spec = layer.weight_fake_quant.spec
        scale, zero_point = layer.weight_fake_quant.qparams(layer.matrix)
        codes = quantize(layer.matrix, scale, zero_point, spec)
        if not spec.symmetric:
            codes = _signed(codes.float(), spec)
        elif spec.is_float:
            codes = grid_of(spec).decode(codes, zero_point)
        stored = _stored_codes(tensors, name, spec, layer.matrix.shape)
        failures += compare_tensors(f"{name}.weight", "codes", stored, codes)
        for key, expected_scale in weight_scales(layer.weight_fake_quant, layer.matrix).items():
            found = tensors.get(f"{name}.{key}")
            if found is not None and found.dtype == torch.uint8:  # exponents of powers of two
                found = torch.exp2(found.float() - 127)
            failures += compare_tensors(f"{name}.{key}", _KINDS.get(key, "scales"), found, expected_scale)
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


def _stored_codes(tensors: Mapping[str, Tensor], name: str, spec: QuantSpec, shape: torch.Size) -> Tensor | None:
    """The codes of a layer as numbers, unpacked by compressed-tensors; None if there are none."""
    from compressed_tensors.compressors.mxfp6.helpers import unpack_fp6_from_uint8
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed = tensors.get(f"{name}.weight_packed")
    if packed is None:
        return tensors.get(f"{name}.weight")
    if spec.is_float:
        unpack = {4: unpack_fp4_from_uint8, 6: unpack_fp6_from_uint8}[spec.num_bits]
        unpacked: Tensor = unpack(packed, *shape, dtype=torch.float32)
        return unpacked
    stored = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    codes: Tensor = unpack_from_int32(packed, spec.num_bits, stored)
    return codes


def _signed(unsigned: Tensor, spec: QuantSpec) -> Tensor:
    """Asymmetric codes or zero points, float32, as the signed integers of the format."""
    return torch.sub(unsigned, 2 ** (spec.num_bits - 1)).to(torch.int8)


def _load(folder: Path) -> nn.Module:
    loaded = load_folder(folder)
    if (quantizer := getattr(loaded, "hf_quantizer", None)) is not None:
        with quietly():
            quantizer.compressor.decompress_model(loaded)  # else the first forward pass would
    return loaded


def _static_scale(fake_quant: FakeQuantize) -> Tensor:
    return fake_quant.qparams(torch.empty(0))[0]
