"""Export to ExecuTorch: one ``.pte`` file for its XNNPACK backend, with the codes and scales of training.

Quantized layers become the operators that ExecuTorch's partitioner gives to XNNPACK: integer layers that read and write
codes, or linear layers whose inputs are quantized per token while they run (8da4w). The bias of an integer layer is
stored as the float32 value of its int32 codes, from which the partitioner computes the same codes again.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.export.executorch.layers import to_decomposed
from qatkit.export.executorch.lowering import INSTEAD, lower
from qatkit.export.executorch.read_back import compare_and_load
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.onnx import format as onnx
from qatkit.export.onnx.inputs import inputs_of
from qatkit.quantization.layers import QATConv2d, QATLinear
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.prepare import qat_layers
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec
from qatkit.tasks import TASKS, Task, model_inputs, task_of

_LINEAR = (nn.Linear, QATLinear)
_LAYERS = (*_LINEAR, nn.Conv2d, QATConv2d)
_GROUP = 32
"""XNNPACK's groups are multiples of this."""


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if XNNPACK cannot store or compute a quantized layer as in training. Weights are not read.

    Raises:
        QatkitError: the quantization of a layer or of the KV cache is not supported.
    """
    if planned.kv_cache:
        raise QatkitError("ExecuTorch export does not support KV cache quantization", advice="remove kv_cache")
    for name, scheme in planned.schemes.items():
        layer = model.get_submodule(name)
        if type(layer) not in _LAYERS:
            kind = type(layer).__name__.removeprefix("QAT")
            raise QatkitError(
                f"layer '{name}': ExecuTorch export does not support a quantized {kind}",
                advice=f"exclude it, or {INSTEAD}",
            )
        problem = _problem(layer, scheme, planned.linear_codes)
        if problem:
            raise QatkitError(f"layer '{name}': {problem[0]}", advice=f"set {problem[1]}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and str(parameter.dtype) != "torch.float32":
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise QatkitError(
                f"'{name}' is {dtype}, but ExecuTorch export supports only float32",
                advice="train in float32 (trainer.precision: 32-true or bf16-mixed)",
            )


def _problem(layer: nn.Module, scheme: Scheme, codes: bool) -> tuple[str, str] | None:
    """What XNNPACK does not support of a layer's quantization, and the setting that it does."""
    weight, inputs = scheme.weight, scheme.activation
    if weight is None or weight.type != "int" or not weight.symmetric:
        return "XNNPACK's integer layers need symmetric integer weights", "weight: {num_bits: 8}"
    if inputs is None:
        return "XNNPACK's integer layers need quantized inputs", "target: executorch, or target: executorch-8da4w"
    if inputs.scaled_per_batch:
        return _dynamic_problem(layer, weight, inputs)
    if inputs.type != "int" or inputs.num_bits != 8:
        return (
            "XNNPACK's inputs are integers of 8 bits",
            "activation: {num_bits: 8, symmetric: false, strategy: tensor}",
        )
    if weight.strategy not in ("tensor", "channel"):
        return (
            f"XNNPACK has no weight scales per {weight.strategy} with calibrated inputs",
            "weight.strategy: channel, or target: executorch-8da4w",
        )
    if not codes:
        return "XNNPACK's integer layers write codes, but only inputs are quantized", "target: executorch"
    return _byte_problem(weight)


def _dynamic_problem(layer: nn.Module, weight: QuantSpec, inputs: QuantSpec) -> tuple[str, str] | None:
    wanted = (inputs.type, inputs.num_bits, inputs.symmetric, inputs.strategy) == ("int", 8, False, "token")
    if not wanted:
        return (
            "XNNPACK computes dynamic scales per token, with zero points and 8 bits",
            "activation: {num_bits: 8, symmetric: false, strategy: token}",
        )
    if not isinstance(layer, nn.Linear):
        return "dynamic activations are supported only for linear layers", "target: executorch, or exclude it"
    if weight.strategy in ("tensor", "channel"):
        return _byte_problem(weight)
    fits = weight.strategy == "group" and (weight.group_size or 0) % _GROUP == 0 and weight.num_bits <= 4
    if not fits or weight.scale_dtype != "bfloat16":
        return (
            f"XNNPACK stores weights in groups of {_GROUP} or a multiple, with at most 4 bits and bfloat16 scales",
            f"weight: {{num_bits: 4, strategy: group, group_size: {_GROUP}, scale_dtype: bfloat16}}, or "
            "weight.strategy: channel",
        )
    return None


def _byte_problem(spec: QuantSpec) -> tuple[str, str] | None:
    """Some of XNNPACK's kernels add two products in 16 bits, which overflow if both weights are -128."""
    if spec.num_bits == 8 and not (OBSERVERS[spec.observer].computed and spec.scale_rule == "qmax"):
        return (
            f"XNNPACK's 8-bit weights are from -127 to 127, but observer: {spec.observer} and scale_rule: "
            f"{spec.scale_rule} also give -128",
            "weight: {observer: minmax}, or weight: {num_bits: 7}",
        )
    return None


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Trace the model on a test batch and write the file.

    Raises:
        QatkitError: `export_executorch` does not support the model or its inputs.
    """
    args, kwargs = model_inputs(context.batch)
    export_executorch(model, kwargs or args, path, task_of(context.batch, context.task))


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the file's codes, scales, zero points and biases to the model's, and load it into ExecuTorch."""
    return compare_and_load(model, path, threads)


def bound(measured: Measured) -> Bound:
    """Return the error bound of the ONNX export: 1% of the quantization error, or twice the effect of rounding.

    XNNPACK sums in a different order and multiplies by reciprocals of scales, which may change single codes by one
    step.
    """
    return onnx.bound(measured)


def export_executorch(model: nn.Module, example: Any, path: Path | str, task: Task | str | None = None) -> None:
    """Write a plain or fake-quantized model to an ExecuTorch file for XNNPACK.

    The model is not changed; the file computes the outputs of the model in eval mode. The batch dimension, and for text
    the sequence length, are dynamic, and at most those of the example.

    Args:
        model: A plain float32 model, or a calibrated model prepared by `prepare_for_target`, or by `prepare_qat` with
            activations per token.
        example: The inputs of one call, as in `qatkit.export.onnx.format.export_onnx`.
        path: The ``.pte`` file, which is written atomically.
        task: As in `export_onnx`.

    Raises:
        QatkitError: ExecuTorch is not installed; a layer's quantization or the example is not supported; PyTorch cannot
            trace the model; or XNNPACK would compute a quantized layer in floating point.
    """
    path = Path(path)
    FORMATS["executorch"].check_packages()
    check(model, PlannedExport.of(model))
    for name, layer in qat_layers(model):
        for part in (layer.weight_fake_quant, layer.input_fake_quant):
            if part is not None and not part.ready:
                raise QatkitError(
                    f"layer '{name}': the {part.role} scale was never set",
                    advice="call qatkit.calibrate(model, batches) first",
                )
    inputs = inputs_of(model, example, TASKS.row(task, "task") if isinstance(task, str) else task)
    plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    config: Any = getattr(plain, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # the cache of keys and values is an output that no file holds
    to_decomposed(plain)
    data = lower(plain, inputs)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
