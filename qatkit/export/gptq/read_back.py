"""Read back a folder in the layout of GPTQ or AWQ: weights and outputs by gptqmodel, or without it by formula."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qatkit.export.companions import json_difference
from qatkit.export.dense import dense_state
from qatkit.export.gptq.content import quantization_config, unsigned_parts, weight_spec
from qatkit.export.gptq.layouts import Layout
from qatkit.export.gptq.runtime import GPTQModel
from qatkit.export.interface import ReadBack
from qatkit.export.separate import SeparateError
from qatkit.export.transformers_folder import compare_tensors
from qatkit.quantization.prepare import qat_layers, quantized_weights, strip_qat
from qatkit.spec import QuantSpec

_PLACES = {"awq": np.array([0, 4, 1, 5, 2, 6, 3, 7])}
"""Where a word holds the codes of neighboring output channels, by layout: in AWQ, the second code is the fifth."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, folder: Path, layout: Layout, python: Path | None) -> ReadBack:
    """Compare a folder's tensors, config and dequantized weights to a model, and load it.

    Args:
        trained: The model, in eval mode on the CPU.
        folder: A folder written by `export_packed`.
        layout: Its layout.
        python: The interpreter of an environment with gptqmodel. If None, weights are decoded by formula, and PyTorch
            computes the outputs.

    Raises:
        QatkitError: the interpreter does not start, or has no gptqmodel.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    except (SafetensorError, OSError, ValueError) as error:
        return ReadBack(weights, [f"{folder.name} cannot be read: {error}"], None)
    config = quantization_config(trained, layout)
    failures = [
        json_difference("config.json", key, found.get(key), config.get(key))
        for key in sorted({*config, *found})
        if found.get(key) != config.get(key)
    ]
    failures += _layer_failures(trained, tensors, layout)
    expected = _untied_state(trained)
    layers = dict(qat_layers(trained))
    known = {f"{key}.{part}" for key in layers for part in ("qweight", "qzeros", "scales", "g_idx")}
    plain = {key: value for key, value in expected.items() if key.removesuffix(".weight") not in layers}
    for key, value in plain.items():
        failures += compare_tensors(key, "values", tensors.get(key), value)
    failures += [f"'{key}': the trained model has no such tensor" for key in tensors if key not in known | plain.keys()]
    name = f"PyTorch, decoding the {layout.name.upper()} folder,"
    if failures:
        return ReadBack(weights, failures, None, name=name, not_run="" if python else "gptqmodel")
    if python is None:
        model = copy.deepcopy(trained)
        strip_qat(model)
        decoded = {f"{key}.weight": _decoded(tensors, key, weight_spec(layer), layout) for key, layer in layers.items()}
        for key, value in decoded.items():
            failures += compare_tensors(key, "decoded values", value, expected[key])
        model.load_state_dict(dense_state(trained) | decoded)
        return ReadBack(weights, failures, model, name=name, not_run="gptqmodel")
    return _in_gptqmodel(trained, folder, expected, python, weights)


def _in_gptqmodel(
    trained: nn.Module, folder: Path, expected: dict[str, Tensor], python: Path, weights: int
) -> ReadBack:
    model = GPTQModel(python)
    name = f"gptqmodel {model.versions['gptqmodel']} in transformers {model.versions['transformers']}"
    failures: list[str] = []
    try:
        found = model.load(folder)
        for layer, module in qat_layers(trained):
            key = f"{layer}.weight"
            failures += compare_tensors(key, "values that gptqmodel decodes", found.get(key), expected[key])
            if weight_spec(module).scale_rule == "minimum":  # products are exact in float16, in which servers compute
                halves = found.get(f"{key}.float16")
                failures += compare_tensors(key, "values that gptqmodel decodes in float16", halves, expected[key])
    except SeparateError as error:
        model.close()
        return ReadBack(weights, [f"gptqmodel cannot load {folder.name}: {error}"], None, name=name)
    except BaseException:
        model.close()
        raise
    return ReadBack(weights, failures, model, name=name, close=model.close)


def _untied_state(trained: nn.Module) -> dict[str, Tensor]:
    """The dense tensors by name, each tied one once, as in the file."""
    first: dict[int, str] = {}
    tied = {
        key
        for key, parameter in trained.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), key) != key
    }
    return {key: value for key, value in dense_state(trained).items() if key not in tied}


def _layer_failures(trained: nn.Module, tensors: dict[str, Tensor], layout: Layout) -> list[str]:
    failures = []
    for name, layer in qat_layers(trained):
        spec, (codes, zeros, scales) = weight_spec(layer), unsigned_parts(layer)
        words = [key for part in ("qweight", "qzeros") if (key := f"{name}.{part}") not in tensors]
        if words:
            failures.append(f"'{words[0]}': the folder has no such tensor")
            continue
        found = _unpacked(tensors, name, spec, layout)
        failures += compare_tensors(f"{name}.qweight", "codes", found[0], codes)
        failures += compare_tensors(f"{name}.qzeros", "zero points", found[1], zeros)
        failures += compare_tensors(f"{name}.scales", "scales", tensors.get(f"{name}.scales"), scales.T)
        if layout.name == "gptq":
            groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
            failures += compare_tensors(f"{name}.g_idx", "groups", tensors.get(f"{name}.g_idx"), groups)
    return failures


def _unpacked(tensors: dict[str, Tensor], name: str, spec: QuantSpec, layout: Layout) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and zero points ``[out, groups]`` from the words of the file, by the formulas of vLLM."""
    words, zeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    if layout.name == "awq":
        codes, points = (_values(part, spec.num_bits, _PLACES["awq"]).T for part in (words, zeros))
    else:
        codes, points = _values(words.T, spec.num_bits), _values(zeros, spec.num_bits).T
        points = points + (1 if spec.symmetric else 0)
    return codes, points


def _values(words: Tensor, bits: int, places: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None) -> Tensor:
    """Unsigned values ``[rows, n]`` from rows of little-endian bits in 32-bit words."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    values = stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))
    if places is not None:
        values = values.reshape(len(words), -1, len(places))[..., places].reshape(len(words), -1)
    return torch.from_numpy(values)


def _decoded(tensors: dict[str, Tensor], name: str, spec: QuantSpec, layout: Layout) -> Tensor:
    codes, zeros = _unpacked(tensors, name, spec, layout)
    scales = tensors[f"{name}.scales"].T
    size = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
