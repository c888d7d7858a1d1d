"""ONNX export with integer weights: quantized layers become QuantizeLinear / DequantizeLinear (QDQ) nodes.

A QDQ graph represents the training arithmetic exactly, and ONNX Runtime, OpenVINO and TensorRT fuse it into integer
kernels. Whether ONNX Runtime does so depends on the bias, the input codes and the following layer. The bias must be
int32, with the product of weight and input scale as its scale; it is always exported in this form. The input codes must
be unsigned after a ReLU (`symmetric: false`), and the layer after a convolution must be quantized too.
`qatkit.export.onnx.runtime.integer_kernels` counts the kernels that were chosen.

Tensors keep the layers' names: ``{layer}.weight.codes``, ``.scale``, ``.zero_point``, ``{layer}.input.scale``,
``.zero_point``, ``{layer}.bias.codes``, ``.scale`` (or ``{layer}.bias`` if it stays in floating point). A layer with
multiple weights has such tensors for each of them: ``{layer}.q_proj.weight.codes``.

Linear layers with dynamic activations multiply integers instead (`qatkit.export.onnx.dynamic`), and signed codes have
no zero point there. Weight-only layers are decoded once, when the file is loaded (`qatkit.export.onnx.constants`), or
packed (`qatkit.export.onnx.packed`). There, codes of at most 4 bits take 4 bits; all others take a byte.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.onnx.graph import name_after_layers, save, trace
from qatkit.export.onnx.inputs import inputs_of, unknown_inputs
from qatkit.export.onnx.limits import check
from qatkit.export.onnx.packed import packing_of, scheme_of, to_packed
from qatkit.export.onnx.points import name_points, to_qdq_points
from qatkit.export.onnx.qdq import is_signed_byte, to_qdq
from qatkit.export.onnx.qdq_layers import has_integer_kernel
from qatkit.export.onnx.qdq_parts import part_layers, to_explicit
from qatkit.export.onnx.qdq_recurrent import QDQRecurrent
from qatkit.export.onnx.runtime import Runtime, check_dtypes, load_runtime, open_session
from qatkit.export.onnx.saturation import SaturationCheck, saturates
from qatkit.export.onnx.weights import compare_onnx_weights
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.state import layer_specs
from qatkit.quantization.targets import TARGETS
from qatkit.schemes import Scheme
from qatkit.tasks import TASKS, Task, model_inputs, task_of


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Trace the model on a test batch and write the file.

    Raises:
        QatkitError: `export_onnx` does not support the model or its inputs.
    """
    args, kwargs = model_inputs(context.batch)
    target = None if context.target is None else context.target.name
    export_onnx(model, kwargs or args, path, task_of(context.batch, context.task), target)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the file's integers to the model's, and load the file into a default ONNX Runtime session.

    LSTMs with dynamic activations run with one thread, because their outputs depend on the number of threads.
    """
    compared = compare_onnx_weights(model, path)
    name = "ONNX Runtime with one thread" if compared.one_thread else ""
    threads = 1 if compared.one_thread else threads
    try:
        runtime = load_runtime(path, threads)
        failures = compared.failures + unknown_inputs(model, runtime.inputs)
        if not (saturates() and compared.at_risk):
            return ReadBack(compared.weights, failures, runtime, name=name)
        exact = open_session(path, threads, entries={"session.x64quantprecision": "1"})
        checked = SaturationCheck(runtime, Runtime(exact), compared.at_risk)
        return ReadBack(compared.weights, failures, checked, checked.failures, name=name)
    except QatkitError as error:
        return ReadBack(compared.weights, [*compared.failures, str(error)], None)


def bound(measured: Measured) -> Bound:
    """Return 1% of the quantization error if quantized inputs affect the output, otherwise 1e-4 of the mean output.

    Without quantized inputs, a model with parameters in half precision may differ by 1% of the mean output.

    A different summation order may move a value across a rounding boundary, which changes one code of the next input.
    In deep networks, and after LayerNorm and softmax, such flips spread. There, the bound is twice the difference
    between the trained model and one whose values are rounded differently (`qatkit.export.rounding`), and at most half
    of the quantization error. Classes and other integers may differ in 1% of the values.
    """
    if not measured.quantizes_inputs and measured.half_precision and not measured.whole:
        return Bound("1% of the mean output, for half precision", 0.01 * measured.mean_output)
    if not measured.quantizes_inputs or measured.quantization_error == 0:
        return Bound("1e-4 of the mean output", 1e-4 * measured.mean_output)
    if measured.whole:
        return Bound("1% of the values", 0.01)
    # float32 noise is allowed even where quantization changes little
    limit = max(0.01 * measured.quantization_error, 1e-6 * measured.mean_output)
    flips = min(2 * measured.rounding_error, 0.5 * measured.quantization_error)
    if flips > limit:
        return Bound("twice the effect of float32 rounding", flips)
    return Bound("1% of the quantization error", limit)


def export_onnx(
    model: nn.Module, example: Any, path: Path | str, task: Task | str | None = None, target: str | None = None
) -> None:
    """Write a plain or fake-quantized model to an ONNX file with a dynamic batch dimension.

    The model is not changed; the file computes the outputs of the model in eval mode. Its inputs are named after the
    parameters of `forward`. Its outputs have the model's output names, or the name "output" if the model returns one
    tensor.

    Args:
        model: A plain float32 model, or a calibrated model prepared by `prepare_qat`.
        example: The inputs of one call: a tensor ``[batch, ...]``, a tuple of positional arguments, or a mapping of
            keyword arguments; only shapes and dtypes matter. None omits an optional input.
        path: The output file, which is written atomically. Tensors of more than 2 GB in total are written to a file
            next to it, such as ``model.1f2e3d4c.onnx.data``.
        task: A task of `qatkit.tasks.TASKS` or its name. It makes more dimensions dynamic: "sequence" for text,
            "height" and "width" for segmentation. By default, integers ``[batch, tokens]`` in a mapping are treated as
            text.
        target: The runtime and processor that run the file, a row of `qatkit.quantization.TARGETS`. With
            "onnxruntime-vnni" and "onnxruntime-arm", 8-bit weights stay signed. By default they become unsigned, which
            is exact on every processor but can be several times slower; a warning says so.

    Raises:
        QatkitError: ONNX is not installed, QDQ does not support a layer's quantization, a layer is not calibrated, a
            weight is not float32, `forward` fails on the example or does not return a tensor, or PyTorch cannot trace
            the model.

    Example:
        >>> import tempfile, torch
        >>> from qatkit import QuantSpec, calibrate, prepare_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = prepare_qat(model, weight=QuantSpec(), activation=QuantSpec(symmetric=False, strategy="tensor"))
        >>> x = torch.rand(16, 8)
        >>> _ = calibrate(model, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     (Path(folder) / "model.onnx").exists()
        True
    """
    FORMATS["onnx"].check_packages()
    check_dtypes(model)
    write_graph(model, example, Path(path), task, target)


def write_graph(
    model: nn.Module,
    example: Any,
    path: Path,
    task: Task | str | None = None,
    target: str | None = None,
    format: str = "onnx",
    packs: bool = True,
) -> None:
    """Write the file of `export_onnx` as an intermediate file of another format.

    Warnings recommend targets of `format`. Unless `packs` is set, no weight is packed (`qatkit.export.onnx.packed`),
    because a runtime may have kernels for the nodes of `qatkit.export.onnx.constants`.
    """
    check(model, PlannedExport.of(model), packs)  # reject everything before the first copy
    inputs = inputs_of(model, example, TASKS.row(task, "task") if isinstance(task, str) else task)
    for name, layer in [*qat_layers(model), *part_layers(model)]:
        _check_ready(name, layer)
    plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    config: Any = getattr(plain, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # the cache of keys and values is an output that no file holds
    to_explicit(plain)
    specs = layer_specs(plain)
    schemes = {name: scheme_of(layer) for name, layer in qat_layers(plain)}
    inside = {layer for module in plain.modules() if isinstance(module, QDQRecurrent) for layer in module.children()}
    row = None if target is None else TARGETS.row(target, "target")
    unsigned = row is None or not row.wide_sums
    if unsigned:
        _warn_of_unsigned(plain, format)
    _warn_of_threads(plain)
    for name, layer in qat_layers(plain):
        packing = packing_of(type(layer), layer.matrix.shape[1], schemes[name])
        if packing is None or layer in inside or not packs:
            to_qdq(name, layer, unsigned, row is not None and row.float_bias)
        else:
            to_packed(layer, packing)
    to_qdq_points(plain)
    program = trace(plain, inputs, opset=21 if any(map(_needs_opset_21, schemes.values())) else 20)
    name_after_layers(program.model, plain)
    name_points(program.model, plain)
    save(program, specs, path)


def _needs_opset_21(scheme: Scheme) -> bool:
    """Whether the weight is decoded per group, or stored in 4 bits."""
    weight = scheme.weight
    return weight is not None and (
        weight.group_size is not None or (scheme.activation is None and weight.num_bits <= 4)
    )


def _check_ready(name: str, layer: QATLayer) -> None:
    for part in (layer.weight_fake_quant, layer.input_fake_quant):
        if part is not None and not part.ready:
            raise QatkitError(
                f"layer '{name}': the {part.role} scale was never set",
                advice="call qatkit.calibrate(model, batches) first",
            )


def _warn_of_unsigned(model: nn.Module, format: str) -> None:
    """Say that 8-bit weights with quantized inputs get slower kernels."""
    slow = [
        name
        for name, layer in qat_layers(model)
        if layer.input_fake_quant is not None
        and layer.weight_fake_quant is not None
        and is_signed_byte(layer.weight_fake_quant.spec)
        and layer.input_fake_quant.spec.strategy == "tensor"
        and has_integer_kernel(type(layer))
    ]
    if slow:
        more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        rows = [row for row in TARGETS.values() if format in row.formats and not row.float_bias]
        portable = next(row.name for row in rows if not row.wide_sums)
        wide = " or ".join(row.name for row in rows if row.wide_sums)
        warnings.warn(
            f"layer '{slow[0]}'{more}: 8-bit weights are stored as unsigned, which is exact on every processor but can "
            f"be several times slower than signed. Use target: {portable} (7 bits, fast everywhere), or target: {wide} "
            "for a processor that accumulates in 32 bits",
            QatkitWarning,
            stacklevel=4,
        )


def _warn_of_threads(model: nn.Module) -> None:
    """Say that the scales of hidden states depend on the number of threads of a session."""
    found = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QDQRecurrent)
        and any(part.input_fake_quant.dynamic for _, part in qat_layers(layer) if part.input_fake_quant is not None)
    ]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"layer '{found[0]}'{more}: with several threads, ONNX Runtime splits a batch and scales the hidden state "
            "of each part on its own, so its outputs differ slightly from those in training; use one thread "
            "(intra_op_num_threads = 1), or one sequence per call",
            QatkitWarning,
            stacklevel=4,
        )
