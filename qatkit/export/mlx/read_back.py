"""Read back an MLX folder: arrays with safetensors; decoded weights and outputs with MLX, or without it by formula."""

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
from qatkit.export.interface import ReadBack
from qatkit.export.mlx.content import config_of, quantized_layers, stored_arrays, weight_spec
from qatkit.export.mlx.packing import mode_of
from qatkit.export.mlx.runtime import MLXModel
from qatkit.export.separate import SeparateError
from qatkit.quantization.elements import FLOAT_FORMATS
from qatkit.quantization.prepare import quantized_weights, strip_qat


@torch.no_grad()
def compare_and_load(trained: nn.Module, folder: Path, python: Path | None) -> ReadBack:
    """Compare a folder's arrays, config and decoded weights to a model, and load it.

    Args:
        trained: The model, in eval mode on the CPU.
        folder: A folder written by `export_mlx`.
        python: The interpreter of an environment with mlx-lm. If None, weights are decoded by formula, and PyTorch
            computes the outputs.

    Raises:
        QatkitError: the interpreter does not start, or has no mlx-lm.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        arrays = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        return ReadBack(weights, [f"{folder.name} cannot be read: {error}"], None)
    wanted = stored_arrays(trained)
    failures = _compared(arrays, wanted, "stored values")
    failures += [f"'{key}': the trained model has no such tensor" for key in arrays if key not in wanted]
    known = config_of(trained)
    failures += [
        json_difference("config.json", key, config.get(key), value)
        for key, value in json.loads(json.dumps(known)).items()
        if config.get(key) != value and key != "transformers_version"
    ]
    plain = copy.deepcopy(trained)
    strip_qat(plain)
    expected = dense_state(trained)
    if python is None:
        name = "PyTorch, decoding the MLX folder,"
        if failures:
            return ReadBack(weights, failures, None, name=name, not_run="MLX")
        decoded = _decoded(trained, arrays)
        failures += _compared(decoded, {key: expected[key] for key in decoded}, "decoded values")
        plain.load_state_dict(expected | decoded)
        return ReadBack(weights, failures, plain, name=name, not_run="MLX")
    model = MLXModel(python)
    try:
        name = f"MLX {model.versions['mlx']} (mlx-lm {model.versions['mlx-lm']})"
        found = model.load(folder)
    except SeparateError as error:
        model.close()
        return ReadBack(weights, [*failures, f"mlx-lm cannot load {folder.name}: {error}"], None, name=name)
    except BaseException:
        model.close()
        raise
    failures += _compared(found, {key: expected[key] for key in wanted if key in expected}, "values that MLX decodes")
    return ReadBack(weights, failures, model, name=name, close=model.close)


def _decoded(trained: nn.Module, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of quantized layers, from the bits of the file and the formulas of MLX's documentation."""
    found = {}
    for name, layer in quantized_layers(trained).items():
        spec, mode = weight_spec(layer), mode_of(weight_spec(layer))
        assert mode is not None
        words, scales = arrays[f"{name}.weight"].numpy(), arrays[f"{name}.scales"]
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(len(words), -1, spec.num_bits)
        codes = bits.astype(np.int64) @ (1 << np.arange(spec.num_bits))
        groups = torch.from_numpy(codes).reshape(*scales.shape, -1)
        if mode.name == "affine":
            values = groups.double() * scales[..., None].double() + arrays[f"{name}.biases"][..., None].double()
        else:
            nvfp4 = mode.name == "nvfp4"
            factors = _float_values(8)[scales.long()] if nvfp4 else torch.exp2(scales.double() - 127)
            values = _float_values(spec.num_bits)[groups] * factors[..., None]
        found[f"{name}.weight"] = values.reshape(len(words), -1)
    return found


def _float_values(bits: int) -> Tensor:
    """The value of every code of e2m1 (4 bits) or e4m3 (8 bits), by the formula of the OCP MX specification."""
    form = FLOAT_FORMATS["float"][bits]
    codes = torch.arange(1 << bits)
    mantissa = (codes & ((1 << form.mantissa_bits) - 1)).double() / (1 << form.mantissa_bits)
    exponent = (codes >> form.mantissa_bits) & ((1 << form.exponent_bits) - 1)
    bias = (1 << (form.exponent_bits - 1)) - 1
    magnitude = torch.where(
        exponent > 0, (1 + mantissa) * torch.exp2((exponent - bias).double()), mantissa * 2.0 ** (1 - bias)
    )
    return torch.where(codes >> (bits - 1) > 0, -magnitude, magnitude)


def _compared(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> list[str]:
    failures = []
    for key, value in expected.items():
        stored = found.get(key)
        if stored is None:
            failures.append(f"'{key}': there are no {what}")
        elif stored.shape != value.shape:
            failures.append(f"'{key}': {what} of shape {list(stored.shape)} instead of {list(value.shape)}")
        elif (wrong := stored.double() != value.double()).any():
            first = wrong.nonzero()[0].tolist()
            failures.append(f"'{key}': {int(wrong.sum())} of {wrong.numel()} {what} differ, the first at {first}")
    return failures
