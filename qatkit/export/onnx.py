"""ONNX with integer weights: every fake-quantized layer becomes a QuantizeLinear / DequantizeLinear (QDQ) layer.

A QDQ graph states what training computed, value by value, and ONNX Runtime, OpenVINO and TensorRT fuse it into integer
kernels. Whether ONNX Runtime does so depends on the bias (int32 with scale weight x input, always written so here), on
the input's codes (unsigned after a ReLU, that is `symmetric: false`), and on the layer after a convolution being
quantized too. `qatkit.export.runtime.integer_kernels` counts what came of it.

The tensors keep the layers' names: ``{layer}.weight.codes``, ``.scale``, ``.zero_point``, ``{layer}.input.scale``,
``.zero_point``, ``{layer}.bias.codes``, ``.scale`` (or ``{layer}.bias`` where it stays in floating point). Codes of 2 to
8 bits are all stored in 8 bits. Group-wise weights are exact but run in floating point.
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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.dense import replacing
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.modules import QATConv2d, QATLayer, QATLinear
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.state import quantizer_state
from qatkit.spec import QuantSpec

_INT32_MAX = 2**31 - 1


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
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
    for name, layer in qat_layers(model):  # every refusal before the first copy
        _check(name, layer)
    specs = quantizer_state(model)[1]
    plain = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for name, layer in qat_layers(plain):
        _to_qdq(name, layer)
    # a batch of one would be taken for a constant
    example = example.detach().cpu()
    example = torch.cat([example, example]) if example.shape[0] == 1 else example
    blocked = any(layer_spec.get("weight", {}).get("group_size") for layer_spec in cast(Any, specs).values())
    program = _trace(plain, example, opset=21 if blocked else 20)
    with replacing(path) as temporary:
        _write(program, specs, temporary)


def _check(name: str, layer: QATLayer) -> None:
    if type(layer) not in _QDQ:
        raise QatkitError(f"layer '{name}': a {type(layer).__name__} cannot be written to ONNX; exclude it")
    if layer.weight.dtype != torch.float32:
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        raise QatkitError(
            f"layer '{name}': its weight is {dtype}, and ONNX's DequantizeLinear gives float32 here; "
            "train in float32 (trainer: precision: 32-true or bf16-mixed)"
        )
    fake_quant = layer.input_fake_quant
    if fake_quant is not None and fake_quant.spec.dynamic:
        raise QatkitError(
            f"layer '{name}': activations with {_words(fake_quant.spec)} have no QDQ form in ONNX (their scales are "
            "computed at run time); write activation: {num_bits: 8, symmetric: false, strategy: tensor}, or choose "
            "another format"
        )
    for part in (layer.weight_fake_quant, fake_quant):
        if part is not None and not part.ready:
            raise QatkitError(
                f"layer '{name}': its {part.role} scale was never set; call qatkit.calibrate(model, batches) first"
            )


def _words(spec: QuantSpec) -> str:
    return f"num_bits: {spec.num_bits}, symmetric: {str(spec.symmetric).lower()}, strategy: {spec.strategy}"


# ------------------------------------------------------------------------------------------- the two operators


@torch.library.custom_op("qatkit::quantize_linear", mutates_args=())
def _quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    codes = (x / scale).round() + zero_point
    return codes.clamp(qmin, qmax).to(zero_point.dtype)


@_quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qatkit::dequantize_linear", mutates_args=())
def _dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: int) -> Tensor:
    grid = codes.view(*codes.shape[:-1], -1, block_size) if block_size else codes
    shape = [*scale.shape, *[1] * (grid.dim() - scale.dim())]
    centred = grid.float() if zero_point is None else grid.float() - zero_point.float().view(shape)
    return (centred * scale.view(shape)).view(codes.shape)


@_dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """The ONNX nodes of the two operators."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def quantize_linear(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
        codes = op.QuantizeLinear(x, scale, zero_point)
        if qmax - qmin == 255:
            return codes
        # Fewer bits: the codes are clipped, not the values, so that Q stays next to its layer and fuses with it.
        low, high = op.Constant(value_int=qmin), op.Constant(value_int=qmax)
        return op.Clip(codes, op.CastLike(low, codes), op.CastLike(high, codes))

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any = None, block_size: int = 0) -> Any:
        if block_size:
            return op.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=block_size)
        return op.DequantizeLinear(codes, scale, zero_point, axis=0)

    ops = torch.ops.qatkit
    return {ops.quantize_linear.default: quantize_linear, ops.dequantize_linear.default: dequantize_linear}


# -------------------------------------------------------------------------------------------------- the QDQ layers


class _Codes(nn.Module):
    """An integer initialiser and the DequantizeLinear after it."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, block_size: int = 0) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.block_size = block_size

    def forward(self) -> Tensor:
        out: Tensor = torch.ops.qatkit.dequantize_linear(self.codes, self.scale, self.zero_point, self.block_size)
        return out


class _Rounding(nn.Module):
    """QuantizeLinear and DequantizeLinear of an activation, one scale for the tensor."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.qmin, self.qmax = spec.qmin, spec.qmax

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.qatkit.quantize_linear(x, self.scale, self.zero_point, self.qmin, self.qmax)
        out: Tensor = torch.ops.qatkit.dequantize_linear(codes, self.scale, self.zero_point, 0)
        return out


class _QDQLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*_operands(self, input))


class _QDQConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(*_operands(self, input)))


_QDQ: dict[type[QATLayer], type[nn.Module]] = {QATLinear: _QDQLinear, QATConv2d: _QDQConv2d}


def _operands(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as the layer computes with them."""
    rounding: Any = layer.input
    weight, bias = (part() if isinstance(part, _Codes) else part for part in (layer.weight, layer.bias))
    return x if rounding is None else rounding(x), cast(Tensor, weight), cast("Tensor | None", bias)


@torch.no_grad()
def _to_qdq(name: str, layer: QATLayer) -> None:
    """Turn a fake-quantized layer into a QDQ layer in place, so that hooks and shared modules keep working."""
    weight: _Codes | Tensor = layer.weight
    bias: _Codes | Tensor | None = cast("Tensor | None", layer.bias)
    rounding = None
    if (fake_quant := layer.input_fake_quant) is not None:
        scale, zero_point = fake_quant.qparams(torch.empty(0))  # never computed: dynamic scales were refused
        dtype = torch.int8 if fake_quant.spec.symmetric else torch.uint8
        rounding = _Rounding(scale.view(()), zero_point.view(()).to(dtype), fake_quant.spec)
    if (fake_quant := layer.weight_fake_quant) is not None:
        spec = fake_quant.spec
        scale, zero_point = fake_quant.qparams(layer.weight)
        codes = quantize(layer.weight, scale, zero_point, spec)
        shape = {"tensor": (), "channel": (-1,)}.get(spec.strategy, tuple(scale.shape))
        weight = _Codes(codes, scale.reshape(shape), zero_point.reshape(shape).to(codes.dtype), spec.group_size or 0)
        if bias is not None and rounding is not None and spec.group_size is None:
            bias = _integer_bias(name, cast(Tensor, bias), weight, rounding)
    del layer.weight, layer.bias, layer.weight_fake_quant, layer.input_fake_quant
    layer.__class__ = cast("type[QATLayer]", _QDQ[type(layer)])
    for part, value in (("weight", weight), ("bias", bias), ("input", rounding)):
        setattr(layer, part, value)


def _integer_bias(name: str, bias: Tensor, weight: _Codes, rounding: _Rounding) -> _Codes | Tensor:
    """The bias in int32 on the grid of the products, weight scale x input scale, which integer kernels need.

    The largest sum a channel can reach must still fit beside its bias, so a channel with a tiny scale and a large bias
    is a danger. Where all its codes stand for zero, any scale gives the same weights, and one that fits is taken;
    otherwise the bias stays in floating point.
    """
    assert weight.zero_point is not None
    rows = weight.zero_point.dim() * [-1] + weight.zero_point.dim() * (weight.codes.dim() - 1) * [1]
    centred = weight.codes.long() - weight.zero_point.long().view(rows)
    widest_input = max(abs(rounding.qmin - int(rounding.zero_point)), abs(rounding.qmax - int(rounding.zero_point)))
    reach = centred.abs().flatten(1).sum(1) * widest_input  # [out]

    def codes() -> tuple[Tensor, Tensor, Tensor]:
        scale = weight.scale * rounding.scale
        exact = bias.double() / scale.double()
        return exact.round(), scale, ~(exact.abs() + reach < _INT32_MAX)  # true for NaN and infinity as well

    values, scale, too_large = codes()
    dead = too_large & (reach == 0) if scale.dim() else too_large.any() & (reach == 0).all()
    if dead.any():
        needed = (bias.abs() if scale.dim() else bias.abs().amax()) / rounding.scale * 2.0**-24
        weight.scale = torch.where(dead, needed.clamp(min=2.0**-100), weight.scale)
        values, scale, too_large = codes()
    if too_large.any():
        warnings.warn(
            f"layer '{name}': its bias is too large for its scales to fit 32 bits (output channel "
            f"{int(too_large.nonzero()[0])}: bias {float(bias[too_large][0]):.3g}), so it is written in floating point "
            "and the layer runs without integer kernels; the file computes the same",
            QatkitWarning,
            stacklevel=4,
        )
        return bias
    return _Codes(values.to(torch.int32), scale)


# -------------------------------------------------------------------------------------------- tracing and writing


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
