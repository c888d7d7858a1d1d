"""compressed-tensors: codes and scales in a folder that plain transformers loads, and vLLM reads.

The codes are made by that package from the latent weights and from the scales that the fake quantizers hold, in float32
as training made them: nothing is derived again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.experts import QATExperts, is_experts
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.prepare import fake_quantizers, qat_layers, strip_qat
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

BITS = (2, 4, 8)
"""Of whole-number weights: others are packed in a way that differs between versions of compressed-tensors."""


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be a folder of transformers.

    Raises:
        QatkitError: the model is not of transformers or holds fused experts, or compressed-tensors is not installed.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise QatkitError(
            f"export.format: 'compressed_tensors' is for models of transformers, and {type(model).__name__} is none; "
            "write export: {format: onnx} or {format: dense}"
        )
    for name, module in model.named_modules():
        if isinstance(module, QATExperts) or is_experts(module):
            raise QatkitError(
                f"layer '{name}': it holds fused experts, whose folder transformers cannot load beside compressed "
                "layers, even where the experts stay as they are; write export: {format: dense}"
            )
    if find_spec("compressed_tensors") is None:
        raise QatkitError(
            "export.format: 'compressed_tensors' needs a package that is not installed; run: pip install 'qatkit[llm]'"
        )


def check_layers(model: nn.Module, chosen: Mapping[str, Scheme], kv_cache: bool = False) -> None:
    """Refuse quantization that the format, or what loads it, cannot hold; weights are not read.

    Args:
        model: The model, its layers plain or swapped.
        chosen: By layer name, how it is quantized.
        kv_cache: Whether keys and values are quantized.

    Raises:
        QatkitError: a layer cannot be held; the message says what to write instead.
    """
    instead = "write export: {format: dense}"
    if kv_cache:
        raise QatkitError(
            "kv_cache: transformers does not round keys and values of a compressed_tensors folder; leave it out, or "
            f"{instead}"
        )
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    for name, scheme in chosen.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise QatkitError(
                f"layer '{name}': compressed_tensors holds linear layers, and this is {type(layer).__name__}; exclude "
                f"it, or {instead}"
            )
        if tied := [other for other in owners[id(layer.weight)] if other != name]:
            raise QatkitError(
                f"layer '{name}': its weight is tied to '{tied[0]}', and codes cannot be shared; exclude it, or make "
                "the model with weights of their own (tie_embeddings: false, tie_word_embeddings: false)"
            )
        problem = _weight_problem(scheme.weight, layer.weight.dtype) or _input_problem(scheme, layer.weight.dtype)
        if problem:
            raise QatkitError(f"layer '{name}': {problem}; or {instead}")


def _weight_problem(spec: QuantSpec | None, dtype: torch.dtype) -> str | None:
    if spec is None:
        return "compressed_tensors holds no layer of which only the input is quantized; quantize its weight too"
    if spec.type == "ternary":
        return "compressed_tensors has no ternary codes; write weight: {num_bits: 2}"
    if spec.is_float and (spec.num_bits != 8 or spec.type != "float"):
        return (
            f"transformers reads compressed floats of {spec.num_bits} bits ({spec.type}, MX, NVFP4) in bfloat16 alone, "
            "so equality could not be shown; write scheme: FP8_DYNAMIC or W4A16"
        )
    if spec.scale_dtype.startswith("float8"):
        return f"scales of {spec.scale_dtype} are read in bfloat16 alone; write scheme: FP8_DYNAMIC"
    if not spec.symmetric:
        return "transformers cannot load packed zero points; write weight: {symmetric: true}"
    if spec.scale_rule == "signed":
        return "scale_rule 'signed' (Q4_0) is a grid of GGUF with negative scales; write scheme: W4A16"
    if not spec.is_float and spec.num_bits not in BITS:
        return f"{spec.num_bits} bits are packed otherwise by other versions; write weight: {{num_bits: 4}}, or 2 or 8"
    if not spec.is_float and spec.strategy == "block":
        return "compressed_tensors scales blocks of fp8 alone; write strategy: group"
    return _scale_problem("weight", spec, dtype)


def _input_problem(scheme: Scheme, dtype: torch.dtype) -> str | None:
    spec = scheme.activation
    if spec is None:
        return None
    if spec.is_float and (spec.num_bits != 8 or spec.type != "float" or spec.scale_dtype.startswith("float8")):
        return f"transformers does not round inputs to {spec.type} of {spec.num_bits} bits; write scheme: FP8_DYNAMIC"
    if not spec.symmetric:
        return "vLLM and transformers agree on symmetric inputs alone; write activation: {symmetric: true}"
    if not spec.is_float and spec.num_bits not in (4, 8):
        return f"inputs of {spec.num_bits} bits have no kernel anywhere; write activation: {{num_bits: 8}}"
    if not spec.is_float and spec.strategy == "group":
        return "inputs in groups are for fp8; write activation: {strategy: token}"
    if spec.strategy == "token" and not spec.is_float and spec.scale_rule != "range":
        return (
            "transformers divides a token's largest magnitude by half the range of codes (127.5), and training divides "
            "by the largest code; write scheme: W8A8, or activation: {scale_rule: range}"
        )
    if spec.strategy in ("token", "group") and spec.scale_dtype != _name(dtype):
        return f"transformers computes the scales of inputs in {_name(dtype)}; write scale_dtype: {_name(dtype)}"
    return _scale_problem("activation", spec, dtype)


def _scale_problem(side: str, spec: QuantSpec, dtype: torch.dtype) -> str | None:
    # a float32 file holds any scale; a half-precision one is loaded whole in its dtype, scales included
    if dtype == torch.float32 or spec.scale_dtype == _name(dtype):
        return None
    return (
        f"the file is loaded in {_name(dtype)}, scales included, and training has them in {spec.scale_dtype}; write "
        f"{side}: {{scale_dtype: {_name(dtype)}}}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def export_compressed(model: nn.Module, folder: Path | str) -> None:
    """Write a model of transformers as a folder that `from_pretrained` loads; its quantized layers as codes and scales.

    Layers that are not quantized are in the ignore list of the folder's config; layers of several kinds are in several
    config groups. A model without quantized layers is written plain.

    Args:
        model: A model of transformers, plain or from `prepare_qat`, calibrated. Left as it is.
        folder: Where config and weights go; replaced whole or not at all.

    Raises:
        QatkitError: the format cannot hold the model.

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
    check_model(model)
    layers = dict(qat_layers(model))
    chosen = {
        name: Scheme(_spec(layer.weight_fake_quant), _spec(layer.input_fake_quant)) for name, layer in layers.items()
    }
    kv_cache = any(name.rpartition(".")[2] == "key_fake_quant" for name, _ in fake_quantizers(model))
    check_layers(model, chosen, kv_cache)
    scales = {
        name: _scales(layer.weight_fake_quant, layer.input_fake_quant, layer.matrix) for name, layer in layers.items()
    }
    with torch.no_grad():
        biases = {name: layer.shipped().get("bias") for name, layer in layers.items()}
    plain = copy.deepcopy(model).cpu()
    strip_qat(plain)
    with _replacing(Path(folder)) as temporary, quietly():
        compressor = _compress(plain, chosen, scales, biases) if chosen else None
        cast(Any, plain).save_pretrained(temporary)
        if compressor is not None:
            compressor.update_config(str(temporary))


def _compress(
    model: nn.Module,
    chosen: Mapping[str, Scheme],
    scales: Mapping[str, Mapping[str, Tensor]],
    biases: Mapping[str, Tensor | None],
) -> Any:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    apply_quantization_config(model, _config(model, chosen), show_progress=False)
    dtypes = {}
    with torch.no_grad():
        for name, own in scales.items():
            layer = model.get_submodule(name)
            weight = cast(Tensor, layer.weight)
            dtypes[name] = weight.dtype
            weight.data = weight.float()  # in half precision the division by the scale would move codes
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
            kept.data = kept.to(dtypes[name])
    return compressor


def _config(model: nn.Module, chosen: Mapping[str, Scheme]) -> QuantizationConfig:
    """A group for every way of quantizing: of all linear layers where there is one, else of the layers by name."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, scheme in chosen.items():
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
        ignore=[name for name in linear if name not in chosen],
        quantization_status="frozen",
    )


def _arguments(spec: QuantSpec, dynamic: bool = False) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=spec.num_bits,
        type="float" if spec.is_float else "int",
        symmetric=spec.symmetric,
        strategy=spec.strategy,
        group_size=spec.group_size,
        block_structure=None if spec.block_structure is None else list(spec.block_structure),
        dynamic=dynamic and spec.strategy in ("token", "group"),
    )


def _scales(weight: FakeQuantize | None, inputs: FakeQuantize | None, matrix: Tensor) -> dict[str, Tensor]:
    """What the file holds beside the codes, float32, by the format's names."""
    assert weight is not None
    found = {"weight_scale": weight.whole_qparams(full_tensor(matrix))[0].cpu()}
    if inputs is not None and not inputs.dynamic:
        found["input_scale"] = inputs.whole_qparams(torch.empty(0))[0].cpu()
    return found


def _spec(fake_quant: FakeQuantize | None) -> QuantSpec | None:
    return None if fake_quant is None else fake_quant.spec


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or goes away if the block raises."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars that transformers and compressed-tensors draw on standard error and that no option turns off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
