"""Export to LiteRT (TensorFlow Lite): one file with the codes and scales of training.

The graph is that of the ONNX export (`qatkit.export.onnx`). Its integer layers, additions, means and max pooling become
LiteRT's integer operations; all others compute in floating point. Inputs and outputs are floating-point tensors in
PyTorch's layout. Tensors keep the names of layers, ``{layer}.weight`` and ``{layer}.bias``, and of their quantizers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.litert.content import Content, encode
from qatkit.export.litert.graph import INSTEAD, Graph
from qatkit.export.litert.operators import unsupported
from qatkit.export.litert.products import OPERATORS
from qatkit.export.litert.read_back import compare_and_load
from qatkit.export.module_classes import check_classes
from qatkit.export.onnx import format as onnx
from qatkit.export.onnx.limits import check as check_onnx
from qatkit.export.onnx.runtime import NAMED, ONLY_OUTPUT, check_dtypes
from qatkit.quantization.layers import QATConv2d, QATLinear
from qatkit.quantization.observers import OBSERVERS
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec
from qatkit.tasks import Task, model_inputs, task_of

_LAYERS = (nn.Linear, nn.Conv2d, QATLinear, QATConv2d)
_MODULES = {
    *_LAYERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, nn.GELU, nn.SiLU,
    nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d,
}  # fmt: skip
"""Classes of torch.nn that can be converted, without containers."""
_LIMIT = 2**31 - 2**24
"""Maximum bytes of constants: offsets in the file have 32 bits, and the graph takes some of them."""


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if LiteRT cannot store or compute a model as in training. Weights are not read.

    Raises:
        QatkitError: the quantization of a layer or of the KV cache, or the class of a layer, is not supported.
    """
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme)
    check_classes(model, _MODULES, "LiteRT", INSTEAD)
    try:
        check_onnx(model, planned, packs=False)
    except QatkitError as error:
        raise error.with_fields(problem=f"LiteRT files are converted from ONNX: {error.problem}") from None


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    if not isinstance(layer, _LAYERS):
        kind = type(layer).__name__.removeprefix("QAT")
        raise QatkitError(
            f"layer '{name}': LiteRT export does not support a quantized {kind}", advice=f"exclude it, or {INSTEAD}"
        )
    problem = _weight_problem(scheme.weight) or _activation_problem(scheme.activation)
    if problem:
        raise QatkitError(f"layer '{name}': {problem[0]}", advice=f"set {problem[1]}, or target: litert")


def _weight_problem(spec: QuantSpec | None) -> tuple[str, str] | None:
    """What LiteRT does not store of a weight, and the setting that it does."""
    if spec is None:
        return None
    if spec.type != "int" or not spec.symmetric:
        return "LiteRT's weights are symmetric integers", "weight: {num_bits: 8}"
    if spec.strategy not in ("tensor", "channel"):
        return f"LiteRT's integer layers have no weight scales per {spec.strategy}", "weight.strategy: channel"
    if spec.num_bits == 8 and not (OBSERVERS[spec.observer].computed and spec.scale_rule == "qmax"):
        seen = f"observer: {spec.observer} and scale_rule: {spec.scale_rule}"
        return (
            f"LiteRT's 8-bit weights are from -127 to 127, but {seen} also give -128",
            "weight: {observer: minmax}, or weight: {num_bits: 7}",
        )
    return None


def _activation_problem(spec: QuantSpec | None) -> tuple[str, str] | None:
    if spec is None or (spec.type == "int" and spec.num_bits == 8 and not spec.scaled_per_batch):
        return None
    return (
        "LiteRT's integer layers read inputs of 8 bits with one calibrated scale",
        "activation: {num_bits: 8, symmetric: false, strategy: tensor}",
    )


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Trace the model on a test batch and write the file.

    Raises:
        QatkitError: `export_litert` does not support the model or its inputs.
    """
    args, kwargs = model_inputs(context.batch)
    export_litert(model, kwargs or args, path, task_of(context.batch, context.task))


def read_back(model: nn.Module, path: Path, threads: int | None, python: Path | None) -> ReadBack:
    """Compare the file's codes, scales and parameters to the model's, and load it.

    With an interpreter, LiteRT reads the tensors and computes the outputs. Without one, the tensors are read from the
    bytes of the file, and PyTorch computes the outputs.
    """
    return compare_and_load(model, path, threads, python)


def bound(measured: Measured) -> Bound:
    """Return the error bound of the ONNX export: 1% of the quantization error, or twice the effect of rounding.

    XNNPACK multiplies by the reciprocal of a scale, adds codes with integer factors of about 20 bits, and sums in a
    different order. Each may change single codes by one step.
    """
    return onnx.bound(measured)


def export_litert(model: nn.Module, example: Any, path: Path | str, task: Task | str | None = None) -> None:
    """Write a plain or fake-quantized model to a LiteRT file, with a dynamic batch dimension.

    The model is not changed; the file computes the outputs of the model in eval mode.

    Args:
        model: A plain float32 model, or a calibrated model prepared by `prepare_qat` or `prepare_for_target`.
        example: The inputs of one call, as in `qatkit.export.onnx.format.export_onnx`.
        path: The ``.tflite`` file, which is written atomically.
        task: As in `export_onnx`.

    Raises:
        QatkitError: ONNX or flatbuffers is not installed, or an operation, a layer's quantization, or the example is
            not supported.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.quantization import calibrate, prepare_for_target
        >>> model, x = nn.Sequential(nn.Linear(8, 4)), torch.rand(16, 8)
        >>> _ = prepare_for_target(model, "litert", x)
        >>> _ = calibrate(model, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_litert(model, x, Path(folder) / "model.tflite")
        ...     (Path(folder) / "model.tflite").exists()
        True
    """
    path = Path(path)
    FORMATS["litert"].check_packages()
    check_dtypes(model)
    check(model, PlannedExport.of(model))
    data = encode(_converted(model, example, task))
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _converted(model: nn.Module, example: Any, task: Task | str | None) -> Content:
    import onnx as library

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.write_graph(model, example, file, task, "litert", format="litert", packs=False)
        proto = library.shape_inference.infer_shapes(library.load(file))
    graph = Graph(proto)
    size = sum(values.nbytes for values in graph.constants.values())
    if size > _LIMIT:
        raise QatkitError(f"{size:,} bytes of weights do not fit into a LiteRT file", advice=INSTEAD)
    for value in proto.graph.input:
        if value.type.tensor_type.elem_type != library.TensorProto.FLOAT:
            raise QatkitError(f"input '{value.name}': LiteRT export supports only float32 inputs", advice=INSTEAD)
        graph.content.inputs[value.name] = graph.new_float(value.name, False)
    for node in proto.graph.node:
        if node.output[0] in graph.skipped:
            continue
        if node.op_type not in OPERATORS:
            raise unsupported(node, f"the operation {node.op_type}")
        OPERATORS[node.op_type](graph, node)
    named = any(entry.key == NAMED for entry in proto.metadata_props)
    for name in graph.outputs:
        key = "" if graph.outputs == [ONLY_OUTPUT] and not named else name
        graph.content.outputs[key] = graph.float(name, False)
    return graph.content
