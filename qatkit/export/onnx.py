"""ONNX with integer weights: every fake-quantized layer becomes a QuantizeLinear / DequantizeLinear (QDQ) layer.

A QDQ graph states what training computed, value by value, and ONNX Runtime, OpenVINO and TensorRT fuse it into integer
kernels. Whether ONNX Runtime does so depends on the bias (int32 with scale weight x input, always written so here), on
the input's codes (unsigned after a ReLU, that is `symmetric: false`), and on the layer after a convolution being
quantized too. `qatkit.export.runtime.integer_kernels` counts what came of it.

The tensors keep the layers' names: ``{layer}.weight.codes``, ``.scale``, ``.zero_point``, ``{layer}.input.scale``,
``.zero_point``, ``{layer}.bias.codes``, ``.scale`` (or ``{layer}.bias`` where it stays in floating point). Codes of 2
to 8 bits are all stored in 8 bits. Group-wise weights are exact but run in floating point.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.dense import replacing
from qatkit.export.qdq import QDQ, to_qdq
from qatkit.quantization.experts import QATExperts
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.state import quantizer_state
from qatkit.spec import QuantSpec


def export_onnx(model: nn.Module, example: Tensor, path: Path | str) -> None:
    """Write a plain or a fake-quantized model to an ONNX file whose batch dimension is dynamic.

    The model itself is left as it is; what is written computes as in eval mode.

    Args:
        model: A plain float32 model, or one from `prepare_qat`, calibrated.
        example: One input batch, ``[batch, ...]``; only its shape and dtype matter.
        path: The file to write; appears whole or not at all.

    Raises:
        QatkitError: ONNX is not installed, a layer's quantization cannot be written as QDQ or is not calibrated, a
            weight is not float32, or PyTorch cannot trace the model.

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
    try:
        import onnx  # noqa: F401  (the exporter needs all three; fail before any work)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise QatkitError(f"ONNX export needs {error.name}: pip install 'qatkit[onnx]'") from error
    for name, module in model.named_modules():  # every refusal before the first copy
        if isinstance(module, QATLayer):
            _check(name, module)
        elif isinstance(module, QATExperts) or any(isinstance(part, FakeQuantize) for part in module.children()):
            what = "fused experts" if isinstance(module, QATExperts) else "quantized keys and values"
            raise QatkitError(f"'{name}': {what} cannot be written to ONNX; write export: {{format: dense}}")
    specs = quantizer_state(model)[1]
    plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name, layer in qat_layers(plain):
        to_qdq(name, layer)
    example = example.detach().cpu()
    if len(example) == 1:  # torch.export may take a batch of one for a constant
        example = torch.cat([example, example])
    blocked = any(layer_spec.get("weight", {}).get("group_size") for layer_spec in cast(Any, specs).values())
    program = _trace(plain, example, opset=21 if blocked else 20)
    _name_after_layers(program.model, plain)
    with replacing(Path(path)) as temporary:
        _write(program, specs, temporary)


def _check(name: str, layer: QATLayer) -> None:
    if type(layer) not in QDQ:
        raise QatkitError(f"layer '{name}': a {type(layer).__name__} cannot be written to ONNX; exclude it")
    if layer.weight.dtype != torch.float32:
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        raise QatkitError(
            f"layer '{name}': its weight is {dtype}, and ONNX's DequantizeLinear gives float32 here; "
            "train in float32 (trainer: precision: 32-true or bf16-mixed)"
        )
    fake_quant = layer.input_fake_quant
    if fake_quant is not None and fake_quant.dynamic:
        raise QatkitError(
            f"layer '{name}': activations with {_words(fake_quant.spec)} have no QDQ form in ONNX (their scales are "
            "computed at run time); write activation: {num_bits: 8, symmetric: false, strategy: tensor}, or choose "
            "another format"
        )
    if fake_quant is not None and layer.weight_fake_quant is None:
        raise QatkitError(
            f"layer '{name}': its input is quantized and its weight is not; ONNX Runtime would round such a weight to "
            "8 bits by a rule of its own; write weight: {num_bits: 8}, or leave activation out"
        )
    for part in (layer.weight_fake_quant, fake_quant):
        if part is not None and (part.spec.type != "int" or part.spec.strategy == "block"):
            raise QatkitError(
                f"layer '{name}': a {part.role} of {_words(part.spec)} has no integer QDQ form in ONNX; write "
                "type: int with strategy tensor, channel or group, or choose another format"
            )
        if part is not None and not part.ready:
            raise QatkitError(
                f"layer '{name}': its {part.role} scale was never set; call qatkit.calibrate(model, batches) first"
            )


def _words(spec: QuantSpec) -> str:
    kind = "" if spec.type == "int" else f"type: {spec.type}, "
    return f"{kind}num_bits: {spec.num_bits}, symmetric: {str(spec.symmetric).lower()}, strategy: {spec.strategy}"


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """The ONNX nodes of the two operators."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def quantize_linear(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if qmax - qmin == 255:
            return codes
        # Fewer bits: the codes are clipped, not the values, so that Q stays next to its layer and fuses with it.
        dtype = np.int8 if qmin < 0 else np.uint8
        low, high = (op.Constant(value=onnxscript.ir.tensor(np.array(bound, dtype))) for bound in (qmin, qmax))
        return op.Clip(codes, low, high)

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any = None, block_size: int = 0) -> Any:
        if block_size:
            return op.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=block_size)
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    ops = torch.ops.qatkit
    return {ops.quantize_linear.default: quantize_linear, ops.dequantize_linear.default: dequantize_linear}


def _trace(model: nn.Module, example: Tensor, opset: int) -> Any:
    try:
        with _silence(), torch.no_grad():
            return torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                custom_translation_table=_translations(opset),
                opset_version=opset,
                optimize=False,  # its merging of equal tensors would take names from layers; `_write` simplifies
                verbose=False,
            )
    except Exception as error:  # torch.onnx wraps whatever a forward may raise while it is traced
        reason = str(error.__cause__ or error).strip().splitlines()
        raise QatkitError(
            f"PyTorch cannot export this model with a dynamic batch: {reason[0] if reason else type(error).__name__}"
        ) from error


def _name_after_layers(graph_model: Any, model: nn.Module) -> None:
    """Give the tensors of a layer with several names its first one; tracing takes another."""
    first = {id(layer): name for name, layer in model.named_modules()}
    initializers = graph_model.graph.initializers
    for alias, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, tuple(QDQ.values())) and first[id(layer)] != alias:
            for key in [key for key in initializers if key.startswith(f"{alias}.")]:
                value = initializers.pop(key)
                value.name = f"{first[id(layer)]}.{key.removeprefix(f'{alias}.')}"
                initializers[value.name] = value


def _write(program: Any, specs: dict[str, Any], path: Path) -> None:
    from onnxscript import ir, optimizer, rewriter
    from onnxscript.ir.passes.common import ClearMetadataAndDocStringPass

    with _silence():
        model = program.model
        for _ in range(2):  # rewriting leaves constants to fold, and folding leaves patterns to rewrite
            optimizer.fold_constants(model)
            model = rewriter.rewrite(model)
            optimizer.remove_unused_nodes(model)
        ClearMetadataAndDocStringPass()(model)  # source lines and paths of the machine that exported
        for value in (*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs):
            value.metadata_props.clear()
        model.producer_name = "qatkit"
        model.metadata_props["qatkit.specs"] = json.dumps(specs)
        ir.save(model, path)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's remarks about itself from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
