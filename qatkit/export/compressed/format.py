"""Export to compressed-tensors: a folder with codes and scales that plain transformers and vLLM can load.

The compressed-tensors package computes the codes from the latent weights and the scales of the fake quantizers, in
float32 as in training. Scales are not recomputed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.companions import export_config
from qatkit.export.compressed.limits import INSTEAD, check_layers
from qatkit.export.compressed.weights import NVFP4, compare_and_load, weight_scales
from qatkit.export.formats import FORMATS
from qatkit.export.interface import EXACT, Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.mlx.content import is_mlx_folder
from qatkit.export.transformers_folder import quantization_method, quietly
from qatkit.quantization.arithmetic import dequantize, quantize
from qatkit.quantization.experts import QATExperts, is_experts
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.prepare import qat_layers, strip_qat
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

_SCALE_DTYPES: dict[str, dict[str, Any]] = {
    "float8_e8m0fnu": {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
    NVFP4: {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn},
}
"""Arguments of the config for scales of 8 bits."""

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported as a compressed transformers folder. Weights are not read.

    Raises:
        QatkitError: the model is not a transformers model or has fused experts, or the format does not support the
            quantization of its KV cache or of a layer.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise QatkitError(
            f"'compressed_tensors' is supported only for transformers models, but the model is a "
            f"{type(model).__name__}",
            advice="use export: {format: onnx} or {format: dense}",
        )
    for name, module in model.named_modules():
        if isinstance(module, QATExperts) or is_experts(module):
            raise QatkitError(
                f"layer '{name}': transformers cannot load fused experts, even unquantized ones, from a folder with "
                "compressed layers",
                advice=INSTEAD,
            )
    if planned.kv_cache:
        raise QatkitError(
            "transformers does not quantize the KV cache of a model in compressed_tensors format",
            advice=f"remove kv_cache, or {INSTEAD}",
        )
    check_layers(model, planned.schemes)


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write the folder; `context` is not used."""
    export_compressed(model, path)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the folder's codes, scales and dequantized weights to the model's, and load it with transformers."""
    return compare_and_load(model, path)


def bound(measured: Measured) -> Bound:
    """Return the error bound: 0, or the bound of the ONNX format if inputs are quantized in half precision.

    transformers quantizes inputs as in training, but in the dtype of the inputs, in which scales are less precise.
    """
    if measured.half_precision and measured.quantizes_inputs:
        limit = max(0.01 * measured.quantization_error, 1e-6 * measured.mean_output)
        return Bound("1% of the quantization error", limit)
    return EXACT


def is_model_folder(path: Path) -> bool:
    """Whether a folder contains a transformers model, plain or compressed."""
    return quantization_method(path) in ("", "compressed-tensors") and not is_mlx_folder(path)


def export_compressed(model: nn.Module, folder: Path | str) -> None:
    """Export a transformers model to a folder that `from_pretrained` loads, with quantized layers as codes and scales.

    The folder's config lists unquantized layers under ``ignore``, and has one config group per quantization scheme. A
    model without quantized layers is saved as a plain folder.

    Args:
        model: A transformers model, either plain or prepared by `prepare_qat` and calibrated. It is not changed.
        folder: Output folder for the config and the weights, which is replaced atomically.

    Raises:
        QatkitError: the format does not support the model.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from qatkit import prepare_qat, scheme
        >>> from qatkit.models import llama
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64).eval()
        >>> _ = prepare_qat(model, scheme("W8A8").weight, scheme("W8A8").activation, exclude=["lm_head"])
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     export_compressed(model, Path(parent) / "int8")
        ...     loaded = AutoModelForCausalLM.from_pretrained(Path(parent) / "int8")
        >>> tokens = torch.arange(8)[None]
        >>> torch.equal(loaded(tokens).logits, model(tokens).logits)
        True
    """
    planned = PlannedExport.of(model)
    FORMATS["compressed_tensors"].check_packages()
    check(model, planned)
    schemes, layers = planned.schemes, dict(qat_layers(model))
    scales = {
        name: _scales(layer.weight_fake_quant, layer.input_fake_quant, layer.matrix) for name, layer in layers.items()
    }
    with torch.no_grad():
        biases = {name: layer.shipped().get("bias") for name, layer in layers.items()}
        values = {name: _values(layer) for name, layer in layers.items() if "weight_zero_point" in scales[name]}
    plain = copy.deepcopy(model).cpu()
    strip_qat(plain)
    plain.config = export_config(plain)
    with replaced_folder(Path(folder)) as temporary, quietly():
        compressor = _compress(plain, schemes, scales, biases, values) if schemes else None
        cast(Any, plain).save_pretrained(temporary)
        if compressor is not None:
            compressor.update_config(str(temporary))


def _compress(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    scales: Mapping[str, Mapping[str, Tensor]],
    biases: Mapping[str, Tensor | None],
    values: Mapping[str, Tensor],
) -> Any:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    apply_quantization_config(model, _config(model, schemes), show_progress=False)
    dtypes = {}
    with torch.no_grad():
        for name, own in scales.items():
            layer = model.get_submodule(name)
            weight = cast(Tensor, layer.weight)
            dtypes[name] = weight.dtype
            # in half precision, dividing by the scale would change codes
            weight.data = values[name] if name in values else weight.float()
            for key, scale in own.items():
                kept = cast(Tensor, getattr(layer, key))
                assert kept.shape == scale.shape, (name, key, kept.shape, scale.shape)
                kept.data = scale
            if (bias := biases[name]) is not None:
                cast(Tensor, layer.bias).copy_(full_tensor(bias))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for name, own in scales.items():
        for key in own:
            kept = cast(Tensor, getattr(model.get_submodule(name), key))
            if kept.dtype.itemsize > 1 and not key.endswith("global_scale"):  # these stay float32
                kept.data = kept.to(dtypes[name])
    return compressor


def _config(model: nn.Module, schemes: Mapping[str, Scheme]) -> QuantizationConfig:
    """One config group per scheme: for all linear layers if there is one scheme, otherwise for layers listed by
    name."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, scheme in schemes.items():
        assert scheme.weight is not None
        made = QuantizationScheme(
            targets=["Linear"],
            weights=_arguments(scheme.weight),
            input_activations=None if scheme.activation is None else _arguments(scheme.activation, dynamic=True),
        )
        by_scheme.setdefault(made.model_dump_json(), (made, []))[1].append(name)
    if len(by_scheme) > 1:
        for made, names in by_scheme.values():
            made.targets = names
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return QuantizationConfig(
        config_groups={f"group_{index}": made for index, (made, _) in enumerate(by_scheme.values())},
        ignore=[name for name in linear if name not in schemes],
        quantization_status="frozen",
    )


def _arguments(spec: QuantSpec, dynamic: bool = False) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    local = spec.scale_dtype == NVFP4
    return QuantizationArgs(
        num_bits=spec.num_bits,
        type="float" if spec.is_float else "int",
        symmetric=spec.symmetric,
        strategy="tensor_group" if local else spec.strategy,
        group_size=spec.group_size,
        block_structure=None if spec.block_structure is None else list(spec.block_structure),
        dynamic=dynamic and ("local" if local else spec.strategy in ("token", "group")),
        **_SCALE_DTYPES.get(spec.scale_dtype, {}),
    )


def _values(layer: QATLayer) -> Tensor:
    """The values of the codes, ``[out, in]`` in float32; compressed-tensors rounds ties of other values differently, if
    there is a zero point.
    """
    assert layer.weight_fake_quant is not None
    matrix, spec = full_tensor(layer.matrix).cpu(), layer.weight_fake_quant.spec
    scale, zero_point = (part.cpu() for part in layer.weight_fake_quant.whole_qparams(full_tensor(layer.matrix)))
    return dequantize(quantize(matrix, scale, zero_point, spec), scale, zero_point, spec)


def _scales(weight: FakeQuantize | None, inputs: FakeQuantize | None, matrix: Tensor) -> dict[str, Tensor]:
    """The numbers that the file stores with the codes, by the format's names."""
    assert weight is not None
    scales = weight_scales(weight, full_tensor(matrix))
    if inputs is not None and inputs.outer_scale is not None:
        scales["input_global_scale"] = inputs.outer_scale.cpu().clone()
    elif inputs is not None and not inputs.dynamic:
        scales["input_scale"] = inputs.whole_qparams(torch.empty(0))[0].cpu()
    return scales
