"""Read back an ExecuTorch file: its codes, scales, zero points and biases, and its outputs in ExecuTorch."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.differences import differences
from qatkit.export.executorch.content import Layer, decode
from qatkit.export.executorch.layers import CODE_SHIFT
from qatkit.export.executorch.runtime import ExecuTorchError, ExecuTorchModel
from qatkit.export.interface import ReadBack
from qatkit.export.onnx.folding import batch_norms, holds_a_fold
from qatkit.export.onnx.inputs import unknown_inputs
from qatkit.export.onnx.points import points_of
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers, quantized_weights

Grid = tuple[np.float32, int]
"""Scale and zero point of an activation, for signed codes."""


@torch.no_grad()
def compare_and_load(trained: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare a file to a model, and load it into ExecuTorch.

    Args:
        trained: The model, in eval mode on the CPU.
        path: A file written by `export_executorch`.
        threads: Threads of ExecuTorch; None uses its default.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    name = f"ExecuTorch {version('executorch')}"
    try:
        content = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        return ReadBack(weights, [f"{path.name} cannot be read: {error}"], None, name=name)
    failures = unknown_inputs(trained, content.inputs)
    stored: dict[str, list[Layer]] = {}
    for found in content.layers:
        stored.setdefault(found.name, []).append(found)
    layers = dict(qat_layers(trained))
    for each, layer in layers.items():
        if each not in stored:
            failures.append(f"layer '{each}': not in the file")
        for found in stored.get(each, []):
            failures += _compared(f"layer '{each}'", layer, found)
    norms = batch_norms(trained)
    for each, found in ((each, found) for each, same in stored.items() if each not in layers for found in same):
        failures += _compared_parameters(each, trained.get_submodule(each), norms, found)
    failures += _compared_grids(trained, content.grids)
    try:
        runtime = ExecuTorchModel(path, content, threads)
    except ExecuTorchError as error:
        return ReadBack(weights, [*failures, f"ExecuTorch cannot load {path.name}: {error}"], None, name=name)
    return ReadBack(weights, failures, runtime, name=name)


def _compared(what: str, layer: QATLayer, stored: Layer) -> list[str]:
    assert layer.weight_fake_quant is not None
    assert layer.input_fake_quant is not None
    spec = layer.weight_fake_quant.spec
    scale, zero_point = layer.weight_fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, spec)
    values = stored.weight.array
    if values.dtype != np.int8:
        return [f"{what}: codes of the weight: {stored.weight.dtype} in the file, not int8 or int4"]
    failures = differences(f"{what}: codes of the weight", _in_torch_layout(values, stored), codes)
    if failures:
        return failures
    expected = scale.reshape(-1) if scale.numel() > 1 else scale.reshape(1).expand(len(codes))
    found = stored.weight.scales
    if stored.weight.group_size != (spec.group_size or 0):
        failures.append(
            f"{what}: scales of the weight: groups of {stored.weight.group_size} in the file, not {spec.group_size}"
        )
    elif found is not None and len(found) == len(expected) and not spec.group_size:
        free = ~codes.flatten(1).any(1)  # where all codes are 0, the scale has no effect
        expected = torch.where(free, torch.from_numpy(found.copy()), expected)
    failures += differences(f"{what}: scales of the weight", found, expected)
    if stored.weight.zero_point:
        failures.append(f"{what}: zero point of the weight: {stored.weight.zero_point} in the file, 0 in the model")
    failures += _compared_input(what, layer.input_fake_quant, stored)
    return failures or _compared_bias(what, layer, stored)


def _compared_input(what: str, fake_quant: FakeQuantize, stored: Layer) -> list[str]:
    if fake_quant.dynamic:
        return [] if stored.input.dynamic else [f"{what}: the input's scale is not computed per token"]
    if stored.input.scales is None:
        return [f"{what}: the scale of the input is not in the file"]
    scale, zero_point = _grid(fake_quant)
    return [
        *differences(f"{what}: scale of the input", stored.input.scales, torch.tensor([scale])),
        *differences(
            f"{what}: zero point of the input", np.array([stored.input.zero_point]), torch.tensor([zero_point])
        ),
    ]


def _compared_bias(what: str, layer: QATLayer, stored: Layer) -> list[str]:
    bias: Tensor | None = layer.operands(torch.zeros(layer.matrix.shape[1]))[2]
    if bias is None:
        values = None if stored.bias is None else stored.bias.array
        return [f"{what}: the bias: the model has none"] if values is not None and values.any() else []
    if stored.bias is None:
        return [f"{what}: the bias: not in the file"]
    values = stored.bias.array.reshape(-1)
    if stored.bias.dtype != "int32":
        return differences(f"{what}: the bias", values, bias)
    assert stored.weight.scales is not None
    assert stored.input.scales is not None
    if values.shape != tuple(bias.shape):
        return [f"{what}: the bias: shape {list(values.shape)} in the file, {list(bias.shape)} in the model"]
    step = torch.from_numpy(stored.weight.scales * stored.input.scales)
    failures = differences(f"{what}: the bias's scale (weight scale x input scale)", stored.bias.scales, step)
    decoded = values.astype(np.float64) * step.double().numpy()
    wrong = np.abs(decoded - bias.double().numpy()) > 2.0**-22 * np.abs(bias.numpy())  # two float32 roundings
    if wrong.any():
        first = int(wrong.nonzero()[0][0])
        failures.append(
            f"{what}: the bias: {int(wrong.sum())} of {wrong.size} codes represent a different value, the first at "
            f"[{first}]: {decoded[first]:.6g} in the file, {float(bias[first]):.6g} in the model"
        )
    return failures


def _compared_parameters(name: str, layer: nn.Module, norms: Any, stored: Layer) -> list[str]:
    """Compare the parameters of a layer without quantization, unless BatchNorm is folded into it."""
    failures = []
    for part, value in (("weight", stored.weight), ("bias", stored.bias)):
        parameter = getattr(layer, part, None)
        if isinstance(layer, nn.Linear | nn.Conv2d) and value is not None and parameter is not None:
            values = _in_torch_layout(value.array, stored)
            if not holds_a_fold(values, layer, part, norms):
                failures += differences(f"parameter '{name}.{part}'".replace("'.", "'"), values, parameter)
    return failures


def _compared_grids(trained: nn.Module, grids: list[Grid]) -> list[str]:
    """Compare the scales and zero points of all activations: layer inputs, and values that other operations write."""
    expected = {grid: what for what, grid in _expected(trained)}
    found = dict.fromkeys((np.float32(scale), zero_point) for scale, zero_point in grids)
    failures = [
        f"an activation has scale {scale} and zero point {zero_point}, which no quantizer of the model has"
        for scale, zero_point in found
        if (scale, zero_point) not in expected
    ]
    return failures + [
        f"{what}: no activation has its scale {scale} and zero point {zero_point}"
        for (scale, zero_point), what in expected.items()
        if (scale, zero_point) not in found
    ]


def _expected(trained: nn.Module) -> list[tuple[str, Grid]]:
    made = [(f"result '{name}'", _grid(fake_quant)) for name, fake_quant in points_of(trained).items()]
    for name, layer in qat_layers(trained):
        inputs = layer.input_fake_quant
        if inputs is not None and not inputs.dynamic and not layer.input_on_grid:
            made.append((f"layer '{name}': input", _grid(inputs)))
    return made


def _grid(fake_quant: FakeQuantize) -> Grid:
    scale, zero_point = fake_quant.qparams(torch.empty(0))
    shift = 0 if fake_quant.spec.symmetric else CODE_SHIFT
    return np.float32(scale.item()), int(zero_point) - shift


def _in_torch_layout(values: np.ndarray[Any, Any], layer: Layer) -> np.ndarray[Any, Any]:
    """The weight of a layer as ``[out, in, ...]``."""
    if values.ndim != 4:
        return values
    return values.transpose((3, 0, 1, 2) if layer.depthwise else (0, 3, 1, 2))
