"""Read back a compressed-tensors folder: codes and scales from the file, dequantized weights from transformers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.export.interface import ReadBack
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
        failures += _compare(f"{name}.weight", "codes", stored, codes)
        failures += _compare(f"{name}.weight_scale", "scales", tensors.get(f"{name}.weight_scale"), scale)
        if (inputs := layer.input_fake_quant) is not None and not inputs.dynamic:
            stored = tensors.get(f"{name}.input_scale")
            failures += _compare(f"{name}.input_scale", "scales", stored, _static_scale(inputs))
        expected |= {f"{name}.{part}": value for part, value in layer.shipped().items()}
    try:
        loaded = _load(folder)
    except Exception as error:  # the exceptions of transformers share no base class
        reason = " ".join(str(error).split())[:300]
        return ReadBack(weights, [*failures, f"transformers cannot load {folder.name}: {reason}"], None)
    decoded = loaded.state_dict()
    for key, value in expected.items():
        failures += _compare(key, "values", decoded.get(key), value)
    return ReadBack(weights, failures, loaded)


def _load(folder: Path) -> nn.Module:
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, config["architectures"][0])
    with quietly():
        loaded: nn.Module = kind.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        if (quantizer := getattr(loaded, "hf_quantizer", None)) is not None:
            quantizer.compressor.decompress_model(loaded)  # else the first forward pass would
    return loaded


def _compare(key: str, what: str, stored: Tensor | None, expected: Tensor) -> list[str]:
    if stored is None:
        return [f"'{key}': the folder has no such {what}"]
    if stored.shape != expected.shape:
        return [f"'{key}': {what} of shape {list(stored.shape)} instead of {list(expected.shape)}"]
    wrong = stored.float() != expected.float()  # bfloat16, float8 and int8 are exact in float32
    if not wrong.any():
        return []
    first = wrong.nonzero()[0].tolist()
    return [f"'{key}': {int(wrong.sum())} of {wrong.numel()} {what} differ, the first at {first}"]


def _static_scale(fake_quant: FakeQuantize) -> Tensor:
    return fake_quant.qparams(torch.empty(0))[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide the progress bars of transformers and compressed-tensors, which have no option for it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
