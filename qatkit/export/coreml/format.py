"""Export to Core ML: a package with the integer codes and scales of training, for Xcode and Apple's devices.

coremltools converts the traced model. It takes the number of bits, scales and zero points of a weight from buffers of
the model, and computes the codes from the trained values, which lie on the grid, so they are the trained codes.
Core ML itself runs only on Apple's devices: nothing here runs the package.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.coreml.content import PACKAGE, constant_name, quietly_imported
from qatkit.export.coreml.read_back import compare_and_load
from qatkit.export.dense import check as check_tied
from qatkit.export.dense import dense_state
from qatkit.export.formats import FORMATS
from qatkit.export.interface import EXACT, Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.module_classes import check_classes
from qatkit.export.onnx.inputs import inputs_of
from qatkit.export.output_tensors import tensors
from qatkit.quantization.layers import QATConv1d, QATConv2d, QATEmbedding, QATLayer, QATLinear
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import qat_layers, strip_qat
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec
from qatkit.tasks import TASKS, Task, model_inputs, task_of

INSTEAD = "use export: {format: onnx}"
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, QATLinear, QATConv1d, QATConv2d, QATEmbedding)
_MODULES = {
    *_LAYERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.Hardswish,
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softmax, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout,
    nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
}  # fmt: skip
"""Classes of torch.nn that can be converted, without containers."""
_QUANTIZED = 3
"""The number for quantization in ``compression_type`` of coremltools."""


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a Core ML package cannot store a model as in training. Weights are not read.

    Raises:
        QatkitError: the quantization of a layer or of the KV cache, or the class or dtype of a layer, is not supported.
    """
    if callable(getattr(model, "save_pretrained", None)):
        raise QatkitError(
            f"coremltools does not convert models of transformers such as {type(model).__name__}",
            advice="use export: {format: mlx} or {format: gguf} for language models, {format: onnx} for others",
        )
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme)
    check_classes(model, _MODULES, "Core ML", INSTEAD)
    names: dict[str, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dtype != torch.float32:
            raise QatkitError(
                f"'{key}' is {str(parameter.dtype).removeprefix('torch.')}, but Core ML export supports only float32",
                advice="use a float32 model",
            )
        if (other := names.setdefault(constant_name(key), key)) != key:
            raise QatkitError(
                f"'{other}' and '{key}' have the same name in Core ML, which replaces '.' by '_'",
                advice="rename a layer",
            )
    check_tied(model, planned)


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    if not isinstance(layer, _LAYERS):
        kind = type(layer).__name__.removeprefix("QAT")
        raise QatkitError(
            f"layer '{name}': Core ML export does not support a quantized {kind}", advice=f"exclude it, or {INSTEAD}"
        )
    if scheme.activation is not None or scheme.weight is None:
        raise QatkitError(
            f"layer '{name}': Core ML export stores quantized weights, not quantized activations",
            advice=f"remove activation, or {INSTEAD}",
        )
    spec = scheme.weight
    if spec.type != "int" or spec.super_blocks:
        raise QatkitError(
            f"layer '{name}': Core ML's linear quantization stores integers, not {spec.type} codes"
            f"{' in super-blocks' if spec.super_blocks else ''}",
            advice="set weight: {num_bits: 4}",
        )
    if spec.strategy == "block":
        raise QatkitError(
            f"layer '{name}': Core ML export does not support strategy: block", advice="set strategy: group"
        )


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Trace the model on one test sample and write the folder.

    Raises:
        QatkitError: `export_coreml` does not support the model or its inputs.
    """
    args, kwargs = model_inputs(context.batch)
    export_coreml(model, kwargs or args, path, task_of(context.batch, context.task))


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the package's codes, scales and parameters to the model's; PyTorch computes the outputs."""
    return compare_and_load(model, path)


def bound(measured: Measured) -> Bound:
    """Return the error bound: 0, because PyTorch computes the outputs with the decoded weights."""
    return EXACT


def export_coreml(model: nn.Module, example: Any, folder: Path | str, task: Task | str | None = None) -> None:
    """Write a plain or weight-only quantized model to ``model.mlpackage`` in a folder, for batches of one sample.

    The model is not changed; the package is converted, but Core ML does not run here.

    Args:
        model: A float32 model, either plain or prepared by `prepare_qat`.
        example: The inputs of one call, as in `qatkit.export.onnx.format.export_onnx`.
        folder: Output folder, which is replaced atomically.
        task: As in `export_onnx`.

    Raises:
        QatkitError: coremltools is not installed, or cannot convert an operation; or a layer's quantization, or the
            example, is not supported.
    """
    FORMATS["coreml"].check_packages()
    check(model, PlannedExport.of(model))
    plain = copy.deepcopy(model).cpu().eval()
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    inputs = inputs_of(plain, example, TASKS.row(task, "task") if isinstance(task, str) else task)
    one = {name: value[:1] if inputs.axes[name].get(0) else value for name, value in inputs.tensors.items()}
    with torch.no_grad():
        outputs = list(tensors(plain(**one)))
        for name, layer in qat_layers(model):
            if layer.weight_fake_quant is not None:
                _describe(plain.get_submodule(name), layer, layer.weight_fake_quant)
    with replaced_folder(Path(folder)) as temporary:
        _converted(_Traceable(plain, list(one)), one, outputs).save(str(temporary / PACKAGE))


def _describe(plain: nn.Module, layer: QATLayer, quantizer: FakeQuantize) -> None:
    """Add the buffers from which coremltools takes the quantization of a weight."""
    spec, weight = quantizer.spec, layer.weight
    scale, zero_point = (_full_rank(part.cpu(), weight) for part in quantizer.whole_qparams(layer.matrix))
    parts = {
        "compression_type": torch.tensor([_QUANTIZED]),
        "quantization_n_bits": torch.tensor(stored_bits(spec)),
        "quantization_scale": scale,
    }
    if not spec.symmetric:
        parts["zero_point"] = zero_point
    for name, value in parts.items():
        plain.register_buffer(f"_COREML_/weight/{name}", value)


def stored_bits(spec: QuantSpec) -> int:
    """Return the bits of a code in the package: 4 or 8."""
    return 4 if spec.num_bits <= 4 else 8


def _full_rank(numbers: Tensor, weight: Tensor) -> Tensor:
    """Scales or zero points in as many dimensions as the weight."""
    return numbers.reshape(*numbers.shape, *[1] * (weight.dim() - numbers.dim()))


class _Traceable(nn.Module):
    """The model with positional inputs and a tuple of tensors as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self.register_buffer("_COREML_/metadata_version", torch.tensor(2))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.model(**dict(zip(self._names, inputs, strict=True)))).values())


def _converted(model: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> Any:
    """Trace and convert a model to an ML program in float32."""
    coremltools: Any = quietly_imported("coremltools")
    passes = coremltools.PassPipeline.DEFAULT
    passes.remove_passes({"common::fuse_conv_batchnorm"})  # it would change the weights
    integers = {torch.int64: "int32", torch.int32: "int32"}
    try:
        with _quiet(), torch.no_grad():
            traced = torch.jit.trace(model.eval(), tuple(inputs.values()))  # type: ignore[no-untyped-call]
            return coremltools.convert(
                traced,
                inputs=[
                    coremltools.TensorType(name=name, shape=value.shape, dtype=_dtype(integers.get(value.dtype)))
                    for name, value in inputs.items()
                ],
                outputs=[coremltools.TensorType(name=name.replace(".", "_") or "output") for name in outputs],
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS18,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
                pass_pipeline=passes,
            )
    except Exception as error:  # the exceptions of coremltools and of tracing share no base class
        reason = " ".join(str(error).split())[:300]
        raise QatkitError(f"coremltools cannot convert this model: {reason}", advice=INSTEAD) from error


def _dtype(name: str | None) -> Any:
    import numpy as np

    return np.dtype(name or "float32").type


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and messages about versions."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
