"""ONNX export with integer weights: quantized layers become QuantizeLinear / DequantizeLinear (QDQ) nodes.

A QDQ graph represents the training arithmetic exactly, and ONNX Runtime, OpenVINO and TensorRT fuse it into integer
kernels. Whether ONNX Runtime does so depends on the bias (int32 with scale weight x input; always written that way), on
the input codes (unsigned after a ReLU, that is `symmetric: false`), and on whether the layer after a convolution is
quantized too. `qatkit.export.runtime.integer_kernels` counts the kernels that were chosen.

Tensors keep the layers' names: ``{layer}.weight.codes``, ``.scale``, ``.zero_point``, ``{layer}.input.scale``,
``.zero_point``, ``{layer}.bias.codes``, ``.scale`` (or ``{layer}.bias`` if it stays in floating point). Codes of 2
to 8 bits are all stored in 8 bits. Group-wise weights are exact but run in floating point.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, Measured, PlannedExport, ReadBack
from qatkit.export.onnx_graph import name_after_layers, save, trace
from qatkit.export.onnx_points import name_points, to_qdq_points
from qatkit.export.onnx_weights import compare_onnx_weights
from qatkit.export.output_tensors import kinds
from qatkit.export.qdq import QDQ, to_qdq
from qatkit.export.runtime import load_runtime
from qatkit.quantization.layers import QATLayer, swap_of
from qatkit.quantization.parts import QATParts
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.state import quantizer_state
from qatkit.quantization.swaps import parts_class
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

_INSTEAD = "use export: {format: dense}"


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Reject a model that ONNX, as ONNX Runtime reads it, does not support; weights are not read.

    Raises:
        QatkitError: the model takes named inputs, QDQ does not support a quantized layer, or keys and values are
            quantized.
    """
    if planned.task is not None and planned.task.named_inputs:
        raise QatkitError(
            f"'onnx' exports models with one input tensor, but models for the task '{planned.task.name}' take several",
            advice=_INSTEAD,
        )
    if planned.kv_cache:
        raise QatkitError("ONNX does not support quantized keys and values", advice=f"remove kv_cache, or {_INSTEAD}")
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme)


def write(model: nn.Module, path: Path, batch: Any) -> None:
    """Trace the model on a test batch and write it.

    Raises:
        QatkitError: the model takes several inputs, or `export_onnx` rejects it.
    """
    export_onnx(model, example_of(batch), path)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the file's integers with the model's, and load it into ONNX Runtime."""
    weights, failures = compare_onnx_weights(model, path)
    try:
        return ReadBack(weights, failures, load_runtime(path, threads))
    except QatkitError as error:
        return ReadBack(weights, [*failures, str(error)], None)


def bound(measured: Measured) -> Bound:
    """1% of the quantization error if inputs are quantized, otherwise 1e-4 of the mean output.

    A different summation order may move a value across a rounding border, which changes one code of the next input.
    """
    if measured.quantizes_inputs:  # float32 noise is allowed even where quantization happens to change nothing
        limit = max(0.01 * measured.quantization_error, 1e-6 * measured.mean_output)
        return Bound("1% of the quantization error", limit)
    return Bound("1e-4 of the mean output", 1e-4 * measured.mean_output)


def example_of(batch: Any) -> Tensor:
    """The input tensor of a batch ``(inputs, labels)``.

    Raises:
        QatkitError: the batch is a mapping, so the model takes several inputs.
    """
    if isinstance(batch, Mapping):
        raise QatkitError(
            f"'onnx' exports models with one input tensor, but a batch of the data is a mapping with {sorted(batch)}",
            key="export.format",
            advice=_INSTEAD,
        )
    example: Tensor = batch[0]
    return example


def export_onnx(model: nn.Module, example: Tensor, path: Path | str) -> None:
    """Write a plain or fake-quantized model to an ONNX file with a dynamic batch dimension.

    The model is left unchanged; the file computes as the model does in eval mode.

    Args:
        model: A plain float32 model, or a calibrated one from `prepare_qat`.
        example: One input batch, ``[batch, ...]``; only its shape and dtype matter.
        path: The file; written atomically.

    Raises:
        QatkitError: ONNX is not installed, QDQ does not support a layer's quantization, a layer is not calibrated, a
            weight is not float32, the example is not a tensor, or PyTorch cannot trace the model.

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
    check(model, PlannedExport.of(model))  # reject everything before the first copy
    for name, layer in qat_layers(model):
        _check_ready(name, layer)
    specs = quantizer_state(model)[1]
    plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name, layer in qat_layers(plain):
        to_qdq(name, layer)
    to_qdq_points(plain)
    if not isinstance(example, Tensor):
        raise QatkitError(
            f"'onnx' exports models with one input tensor, but this one takes {kinds(example)}", advice=_INSTEAD
        )
    example = example.detach().cpu()
    if len(example) == 1:  # torch.export may treat a batch size of one as a constant
        example = torch.cat([example, example])
    grouped = any(layer_spec.get("weight", {}).get("group_size") for layer_spec in cast(Any, specs).values())
    program = trace(plain, example, opset=21 if grouped else 20)
    name_after_layers(program.model, plain)
    name_points(program.model, plain)
    with atomic_path(Path(path)) as temporary:
        save(program, specs, temporary)


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    parts = type(layer) if isinstance(layer, QATParts) else parts_class(layer)
    if parts is not None:
        raise QatkitError(
            f"layer '{name}': quantized {parts.kind} cannot be exported to ONNX", advice=f"exclude it, or {_INSTEAD}"
        )
    kind = type(layer) if isinstance(layer, QATLayer) else swap_of(type(layer))
    if kind not in QDQ:
        raise QatkitError(
            f"layer '{name}': ONNX export does not support a quantized {_plain_name(layer)}",
            advice=f"exclude the layer, or {_INSTEAD}",
        )
    weight = cast(Tensor, layer.weight)
    if weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise QatkitError(
            f"layer '{name}': the weight is {dtype}, but the ONNX graph dequantizes to float32",
            advice="train in float32 (trainer.precision: 32-true or bf16-mixed)",
        )
    inputs = scheme.activation
    if inputs is not None and inputs.strategy in ("token", "group"):
        raise QatkitError(
            f"layer '{name}': ONNX QDQ does not support dynamic activation quantization ({_words(inputs)})",
            advice="set activation: {num_bits: 8, symmetric: false, strategy: tensor}, or choose another format",
        )
    if inputs is not None and scheme.weight is None:
        raise QatkitError(
            f"layer '{name}': the input is quantized but the weight is not, and ONNX Runtime would quantize the "
            "weight to 8 bits with its own rule",
            advice="set weight: {num_bits: 8}, or remove activation",
        )
    for role, spec in (("weight", scheme.weight), ("activation", inputs)):
        if spec is not None and (spec.type != "int" or spec.strategy == "block"):
            raise QatkitError(
                f"layer '{name}': ONNX integer QDQ does not support {role} quantization with {_words(spec)}",
                advice="set type: int with strategy tensor, channel or group, or choose another format",
            )


def _check_ready(name: str, layer: QATLayer) -> None:
    for part in (layer.weight_fake_quant, layer.input_fake_quant):
        if part is not None and not part.ready:
            raise QatkitError(
                f"layer '{name}': the {part.role} scale was never set",
                advice="call qatkit.calibrate(model, batches) first",
            )


def _plain_name(layer: nn.Module) -> str:
    return type(layer).__name__.removeprefix("QAT")


def _words(spec: QuantSpec) -> str:
    kind = "" if spec.type == "int" else f"type: {spec.type}, "
    return f"{kind}num_bits: {spec.num_bits}, symmetric: {str(spec.symmetric).lower()}, strategy: {spec.strategy}"
