"""Read back a LiteRT file: tensors and outputs with LiteRT, or without it from the bytes and with PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.differences import differences
from qatkit.export.interface import ReadBack
from qatkit.export.litert.content import Content, Grid, decode
from qatkit.export.litert.runtime import LiteRTModel
from qatkit.export.onnx.folding import batch_norms, holds_a_fold
from qatkit.export.onnx.inputs import unknown_inputs
from qatkit.export.onnx.points import points_of
from qatkit.export.separate import SeparateError
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers, quantized_weights


@dataclass(frozen=True)
class _Stored:
    """The tensors of a file by name."""

    values: dict[str, np.ndarray[Any, Any]]
    """Constants, in LiteRT's layout."""
    grids: dict[str, tuple[Grid, str]]
    """Quantization and dtype; tensors without quantization have no scales."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, path: Path, threads: int | None, python: Path | None) -> ReadBack:
    """Compare a file's tensors to a model, and load it.

    Args:
        trained: The model, in eval mode on the CPU.
        path: A file written by `export_litert`.
        threads: Threads of LiteRT; None uses its default.
        python: The interpreter of an environment with ai-edge-litert. If None, PyTorch computes the outputs.

    Raises:
        QatkitError: the interpreter does not start, or has no ai-edge-litert.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        content = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        return ReadBack(weights, [f"{path.name} cannot be read: {error}"], None)
    failures = unknown_inputs(trained, content.inputs)
    if python is None:
        name = "PyTorch, with the weights of the LiteRT file,"
        stored = _stored(content)
        failures += _compared(trained, stored)
        runtime = None if failures else _with_weights(trained, stored)
        return ReadBack(weights, failures, runtime, name=name, not_run="LiteRT")
    model = LiteRTModel(python)
    name = f"LiteRT {model.versions['ai-edge-litert']}"
    try:
        model.load(path, list(content.inputs), list(content.outputs), threads)
        failures += _compared(trained, _Stored(*model.tensors()))
    except SeparateError as error:
        model.close()
        return ReadBack(weights, [*failures, f"LiteRT cannot load {path.name}: {error}"], None, name=name)
    except BaseException:
        model.close()
        raise
    return ReadBack(weights, failures, model, name=name, close=model.close)


def _stored(content: Content) -> _Stored:
    none = Grid(np.zeros(0, np.float32), np.zeros(0, np.int64))
    constants = {tensor.name: tensor.values for tensor in content.tensors if tensor.values is not None}
    return _Stored(constants, {tensor.name: (tensor.grid or none, tensor.dtype) for tensor in content.tensors})


def _compared(trained: nn.Module, stored: _Stored) -> list[str]:
    failures = []
    quantizers = {}
    points = points_of(trained)
    names = {id(fake_quant): name for name, fake_quant in points.items()}
    for name, layer in qat_layers(trained):
        prefix = f"{name}." if name else ""
        inputs = layer.input_fake_quant
        if inputs is not None and not layer.input_on_grid:
            quantizers[f"{prefix}input"] = f"layer '{name}': input", inputs
            names[id(inputs)] = f"{prefix}input"
        if layer.weight_fake_quant is not None:
            failures += _compared_weight(name, prefix, layer, layer.weight_fake_quant, stored)
        failures += _compared_bias(name, prefix, layer, names, stored)
    quantizers |= {name: (f"result '{name}'", fake_quant) for name, fake_quant in points.items()}
    for name, (what, fake_quant) in quantizers.items():
        failures += _compared_quantizer(what, name, fake_quant, stored)
    failures += [
        f"'{name}': the model has no such quantizer"
        for name, (_, dtype) in stored.grids.items()
        if dtype == "int8" and name not in stored.values and name.partition("#")[0] not in quantizers
    ]
    quantized, norms = {id(layer) for _, layer in qat_layers(trained)}, batch_norms(trained)
    for name, module in trained.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in quantized:
            failures += _compared_parameters(name, module, norms, stored)
    return failures


def _compared_weight(name: str, prefix: str, layer: QATLayer, fake_quant: FakeQuantize, stored: _Stored) -> list[str]:
    key, what = f"{prefix}weight", f"layer '{name}'"
    scale, zero_point = fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, fake_quant.spec)
    grid, dtype = stored.grids.get(key, (None, ""))
    failures = differences(f"{what}: codes of the weight", _in_torch_layout(stored.values.get(key), layer), codes)
    if grid is None or failures:
        return failures
    if dtype != "int8":
        failures.append(f"{what}: codes of the weight: {dtype} in the file, not int8")
    axis = 3 if _is_depthwise(layer) else 0
    if len(grid.scales) > 1 and grid.axis != axis:
        failures.append(f"{what}: scales of the weight: dimension {grid.axis} in the file, not {axis}")
    expected = scale.reshape(-1)
    if len(grid.scales) == len(expected):  # where all codes are 0, the scale has no effect
        free = ~codes.flatten(1).any(1) if len(expected) > 1 else ~codes.any().reshape(1)
        expected = torch.where(free, torch.from_numpy(grid.scales.copy()), expected)
    failures += differences(f"{what}: scales of the weight", grid.scales, expected)
    return failures + differences(
        f"{what}: zero points of the weight", grid.zero_points, torch.zeros(len(expected), dtype=torch.int64)
    )


def _compared_bias(name: str, prefix: str, layer: QATLayer, names: dict[int, str], stored: _Stored) -> list[str]:
    bias = layer.operands(torch.zeros(layer.matrix.shape[1]))[2]
    values, what = stored.values.get(f"{prefix}bias"), f"layer '{name}': the bias"
    if bias is None:
        return [] if values is None else [f"{what}: the model has none"]
    if values is None or values.dtype != np.int32:
        return differences(what, None if values is None else values.reshape(-1), bias)
    weight, _ = stored.grids[f"{prefix}weight"]
    inputs = stored.grids.get(names.get(id(layer.input_fake_quant), ""))
    if inputs is None:
        return [f"{what}: the scale of the input, a factor of its scale, is not in the file"]
    step = torch.from_numpy(weight.scales * inputs[0].scales)
    failures = differences(
        f"{what}'s scale (weight scale x input scale)", stored.grids[f"{prefix}bias"][0].scales, step
    )
    decoded = values.astype(np.float64) * step.double().numpy()
    wrong = np.abs(decoded - bias.double().numpy()) > 2.0**-22 * np.abs(bias.numpy())  # two float32 roundings
    if values.shape != tuple(bias.shape) or wrong.any():
        first = int(wrong.nonzero()[0][0])
        failures.append(
            f"{what}: {int(wrong.sum())} of {wrong.size} codes represent a different value, the first at [{first}]: "
            f"{decoded[first]:.6g} in the file, {float(bias[first]):.6g} in the model"
        )
    return failures


def _compared_quantizer(what: str, name: str, fake_quant: FakeQuantize, stored: _Stored) -> list[str]:
    scale, zero_point = fake_quant.qparams(torch.empty(0))
    shift = 0 if fake_quant.spec.symmetric else 128
    found = [value for key, value in stored.grids.items() if key.partition("#")[0] == name and value[1] == "int8"]
    if not found:
        return [f"{what}: not in the file"]
    failures = []
    for grid, _ in found:
        failures += differences(f"{what}: scale", grid.scales, scale.reshape(-1))
        failures += differences(f"{what}: zero point", grid.zero_points, zero_point.reshape(-1).long() - shift)
    return failures


def _compared_parameters(name: str, layer: nn.Linear | nn.Conv2d, norms: Any, stored: _Stored) -> list[str]:
    """Compare the parameters of a layer without quantization, unless BatchNorm is folded into it."""
    failures = []
    for part, parameter in layer.named_parameters():
        key = f"{name}.{part}" if name else part
        values = stored.values.get(key)
        if values is not None:
            found = values.reshape(-1) if part == "bias" else _in_torch_layout(values, layer)
            assert found is not None
            if not holds_a_fold(found, layer, part, norms):
                failures += differences(f"parameter '{key}'", found, parameter)
    return failures


def _in_torch_layout(values: np.ndarray[Any, Any] | None, layer: nn.Module) -> np.ndarray[Any, Any] | None:
    """The weight of a layer as ``[out, in, ...]``."""
    if values is None or values.ndim != 4:
        return values
    return values.transpose((3, 0, 1, 2) if _is_depthwise(layer) else (0, 3, 1, 2))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels


def _with_weights(trained: nn.Module, stored: _Stored) -> Callable[..., Any]:
    """The model with the decoded weights of the file; its quantizers have been compared."""
    model = copy.deepcopy(trained)
    for name, layer in qat_layers(model):
        if layer.weight_fake_quant is not None:
            key = f"{name}.weight" if name else "weight"
            codes = _in_torch_layout(stored.values[key], layer)
            assert codes is not None
            scales = torch.from_numpy(stored.grids[key][0].scales.copy())
            layer.set_matrix(_scaled(torch.from_numpy(codes.copy()), scales))
    return model


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.reshape(-1, *[1] * (codes.dim() - 1))
