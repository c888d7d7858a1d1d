"""Export for torchao: a folder that transformers loads, with torchao's tensors in the place of quantized weights.

The tensors are made of the codes and scales of training; torchao's own quantization would compute new scales.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.companions import export_config
from qatkit.export.dense import dense_state
from qatkit.export.formats import FORMATS
from qatkit.export.interface import EXACT, Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.transformers_folder import (
    compare_tensors,
    load_folder,
    quantization_method,
    quietly,
    untied_linear_layers,
)
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_layers, quantized_weights, strip_qat
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

_INSTEAD = "use export: {format: compressed_tensors} or {format: dense}"


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported for torchao. Weights are not read.

    Raises:
        QatkitError: the model is not a transformers model; torchao does not support the quantization of a layer or of
            the KV cache; or a package is missing.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise QatkitError(
            f"'torchao' is supported only for transformers models, but the model is a {type(model).__name__}",
            advice="use export: {format: onnx} or {format: dense}",
        )
    if planned.kv_cache:
        raise QatkitError("torchao does not quantize the KV cache", advice=f"remove kv_cache, or {_INSTEAD}")
    for name, layer in untied_linear_layers(model, planned.schemes, "torchao", _INSTEAD).items():
        if layer.weight.dtype != torch.float32:
            raise QatkitError(
                f"layer '{name}': the weight is {str(layer.weight.dtype).removeprefix('torch.')}, in which torchao's "
                "products round differently from those of training",
                advice=f"train in float32 (trainer.precision: 32-true or bf16-mixed), or {_INSTEAD}",
            )
        if (refusal := _problem(planned.schemes[name])) is not None:
            raise QatkitError(f"layer '{name}': {refusal[0]}", advice=f"{refusal[1]}, or {_INSTEAD}")
    FORMATS["torchao"].check_packages()


def _problem(scheme: Scheme) -> tuple[str, str] | None:
    weight = scheme.weight
    if weight is None:
        return "torchao does not quantize the input of a layer alone", "quantize the layer's weight too"
    if weight.type != "int" or weight.strategy not in ("channel", "group"):
        return (
            "torchao stores only integer weights with one scale per output channel or group",
            "set weight: {type: int, strategy: channel}",
        )
    if weight.has_minimum:
        return (
            f"torchao stores zero points, but a weight with scale_dtype '{weight.scale_dtype}' has minima",
            "set scheme: W4A16, or use export: {format: gguf}",
        )
    if scheme.activation is not None:
        return (
            "torchao multiplies by the reciprocal of an input's scale where training divides by it, so the largest "
            "value of every token may get another code",
            "remove activation, or use export: {format: compressed_tensors}",
        )
    return None


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write the folder; `context` is not used."""
    export_torchao(model, path)


def bound(measured: Measured) -> Bound:
    """Return the error bound, which is 0: torchao decodes weights in the order of training."""
    return EXACT


def is_torchao_folder(path: Path) -> bool:
    """Whether a folder contains a transformers model with torchao's tensors."""
    return quantization_method(path) == "torchao"


@torch.no_grad()
def export_torchao(model: nn.Module, folder: Path | str) -> None:
    """Export a transformers model to a folder that `from_pretrained` loads, with torchao's tensors as weights.

    Weights are stored as `IntxUnpackedToInt8Tensor`, with one byte per code. A model without quantized layers is saved
    as a plain folder.

    Args:
        model: A transformers model, either plain or prepared by `prepare_qat`. It is not changed.
        folder: The output folder, which is replaced atomically.

    Raises:
        QatkitError: torchao does not support the model.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from qatkit import QuantSpec, prepare_qat
        >>> from qatkit.models import llama
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64).eval()
        >>> _ = prepare_qat(model, QuantSpec(num_bits=8), exclude=["lm_head"])
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     export_torchao(model, Path(parent) / "int8")
        ...     loaded = AutoModelForCausalLM.from_pretrained(Path(parent) / "int8", dtype=torch.float32)
        >>> tokens = torch.arange(8)[None]
        >>> torch.equal(loaded(tokens).logits, model(tokens).logits)
        True
    """
    planned = PlannedExport.of(model)
    check(model, planned)
    model = copy.deepcopy(model).cpu()
    layers = dict(qat_layers(model))
    plain: Any = copy.deepcopy(model)
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    plain.config = copy.deepcopy(export_config(plain))
    for name, layer in layers.items():
        plain.get_submodule(name).weight = nn.Parameter(_tensor(layer), requires_grad=False)
    with replaced_folder(Path(folder)) as temporary, quietly():
        if layers:
            _mark(plain, planned.schemes)
        plain.save_pretrained(temporary)


def _tensor(layer: QATLayer) -> Tensor:
    """torchao's tensor with the codes and scales of a layer."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    assert layer.weight_fake_quant is not None
    codes, scale, zero_point = _parts(layer)
    block = (1, layer.matrix.shape[1] // scale.shape[1])
    kind = getattr(torch, f"int{layer.weight_fake_quant.spec.num_bits}")
    return cast(Tensor, IntxUnpackedToInt8Tensor(codes, scale, zero_point, kind, block, layer.weight.dtype, None))


def _parts(layer: QATLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[out, in]``, scales and zero points ``[out, groups]`` as torchao stores them: int8, around 0."""
    fake_quant = layer.weight_fake_quant
    assert fake_quant is not None
    scale, zero_point = fake_quant.qparams(layer.matrix)
    codes = quantize(layer.matrix, scale, zero_point, fake_quant.spec)
    middle = 0 if fake_quant.spec.symmetric else 2 ** (fake_quant.spec.num_bits - 1)
    signed = [(part.to(torch.int16) - middle).to(torch.int8).contiguous() for part in (codes, zero_point)]
    return signed[0], scale.to(layer.weight.dtype).contiguous(), signed[1].expand(scale.shape).contiguous()


def _mark(plain: Any, schemes: Mapping[str, Scheme]) -> None:
    """Write into the config which layers are quantized, and how: transformers does not look at the tensors."""
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    linear = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name in linear if name not in schemes]
    kinds = {name: _config(scheme.weight) for name, scheme in schemes.items()}
    config = TorchAoConfig(FqnToConfig(kinds), modules_to_not_convert=others)
    plain.config.quantization_config = config
    plain.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _config(weight: QuantSpec | None) -> Any:
    """The torchao configuration that names a scheme."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    assert weight is not None
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{weight.num_bits}"),
        granularity=PerAxis(0) if weight.group_size is None else PerGroup(weight.group_size),
        mapping_type=MappingType.SYMMETRIC if weight.symmetric else MappingType.ASYMMETRIC,
    )


@torch.no_grad()
def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Load the folder with transformers, and compare codes, scales and decoded weights as torchao holds them."""
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(model))
    try:
        loaded = load_folder(path)
    except Exception as error:  # the exceptions of transformers and torchao share no base class
        reason = " ".join(str(error).split())[:300]
        return ReadBack(weights, [f"transformers cannot load {path.name}: {reason}"], None)
    failures: list[str] = []
    layers, expected = dict(qat_layers(model)), dense_state(model)
    for name, layer in layers.items():
        found: Any = loaded.get_submodule(name).weight
        key = f"{name}.weight"
        if not hasattr(found, "qdata"):
            failures.append(f"'{key}': transformers loads a {type(found).__name__} instead of torchao's codes")
            continue
        stored = {"codes": found.qdata, "scales": found.scale, "zero points": found.zero_point}
        for (what, values), own in zip(stored.items(), _parts(layer), strict=True):
            failures += compare_tensors(key, what, values, own)
        failures += compare_tensors(key, "decoded values", found.dequantize(), expected[key])
    decoded = loaded.state_dict()
    for key, value in expected.items():
        if key.removesuffix(".weight") not in layers:
            failures += compare_tensors(key, "values", decoded.get(key), value)
    return ReadBack(weights, failures, loaded)
