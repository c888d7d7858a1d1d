"""Read back a Core ML package: codes, scales and decoded weights with coremltools, outputs with PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.coreml.content import PACKAGE, Array, Constant, constant_name, read_constants
from qatkit.export.dense import dense_state
from qatkit.export.interface import ReadBack
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.prepare import qat_layers, quantized_weights, strip_qat

NAME = "PyTorch, with the weights that coremltools decodes,"


@torch.no_grad()
def compare_and_load(trained: nn.Module, folder: Path) -> ReadBack:
    """Compare the constants of a package to a model, and load the decoded ones into a plain copy of it.

    Args:
        trained: The model, in eval mode on the CPU.
        folder: A folder written by `export_coreml`.
    """
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    try:
        constants = read_constants(folder)
    except Exception as error:  # the exceptions of coremltools share no base class
        reason = " ".join(str(error).split())[:300]
        failures = [f"coremltools cannot read {PACKAGE}: {reason}"]
        return ReadBack(weights, failures, None, name=NAME, not_run="Core ML")
    plain = copy.deepcopy(trained)
    strip_qat(plain)
    layers = {f"{name}.weight": layer for name, layer in qat_layers(trained) if layer.weight_fake_quant is not None}
    failures, decoded = [], {}
    for key, value in dense_state(trained).items():
        decoded[key] = value
        if not value.is_floating_point():
            continue
        found = constants.get(constant_name(key))
        if found is None:
            failures.append(f"'{key}': the program has no such constant")
            continue
        failures += _differences(key, "values", found.values, value)
        if found.values.shape == tuple(value.shape):
            decoded[key] = torch.from_numpy(np.array(found.values))
        if key in layers:
            quantizer = layers[key].weight_fake_quant
            assert quantizer is not None
            matrix = layers[key].matrix
            scale, zero_point = quantizer.whole_qparams(matrix)
            codes = layers[key].as_stored(quantize(matrix, scale, zero_point, quantizer.spec))
            failures += _coded(key, found, codes, scale, None if quantizer.spec.symmetric else zero_point)
    plain.load_state_dict(decoded)
    return ReadBack(weights, failures, plain, name=NAME, not_run="Core ML")


def _coded(key: str, found: Constant, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> list[str]:
    """The differences of the stored codes, scales and zero points of a weight."""
    if found.codes is None or found.scale is None:
        return [f"'{key}': stored without codes"]
    failures = _differences(key, "codes", found.codes, codes)
    failures += _differences(key, "scales", found.scale.reshape(-1), scale.reshape(-1))
    if (found.offset is None) != (zero_point is None):
        return [*failures, f"'{key}': stored {'without' if found.offset is None else 'with'} zero points"]
    if found.offset is not None and zero_point is not None:
        failures += _differences(key, "zero points", found.offset.reshape(-1), zero_point.reshape(-1))
    return failures


def _differences(key: str, what: str, found: Array, expected: Tensor) -> list[str]:
    wanted = expected.cpu().numpy()
    if found.shape != wanted.shape:
        return [f"'{key}': {what} of shape {list(found.shape)} instead of {list(wanted.shape)}"]
    wrong = found.astype(np.float64) != wanted.astype(np.float64)
    if not wrong.any():
        return []
    first = [int(index[0]) for index in wrong.nonzero()]
    return [f"'{key}': {int(wrong.sum())} of {wrong.size} {what} differ, the first at {first}"]
