"""Export to GGUF, the file format of llama.cpp and Ollama.

Quantized weights are stored as the codes and scales of training; the gguf package would compute new scales. All other
tensors are stored without loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from qatkit.common.files import atomic_path
from qatkit.errors import QatkitError
from qatkit.export.dense import check as check_tied
from qatkit.export.formats import FORMATS
from qatkit.export.gguf.architectures import INSTEAD, architecture_of
from qatkit.export.gguf.packing import BlockType, block_type_of, nearest_type
from qatkit.export.gguf.pooling import POOLING, pooling_of, pooling_type
from qatkit.export.gguf.read_back import compare_and_load
from qatkit.export.gguf.tensors import file_metadata, is_transposed, stored_tensors
from qatkit.export.gguf.tokenizer import tokenizer_metadata
from qatkit.export.interface import EXACT, Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.quantization.layers import swap_of
from qatkit.schemes import SCHEMES, Scheme
from qatkit.spec import QuantSpec


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported to GGUF without changing a value. Weights are not read.

    Raises:
        QatkitError: the model's architecture, or the quantization of a layer or of the KV cache, is not supported; or a
            package is missing.
    """
    architecture_of(model)
    if planned.kv_cache:
        raise QatkitError(
            "llama.cpp quantizes the KV cache itself, with its options --cache-type-k and --cache-type-v",
            advice=f"remove kv_cache, or {INSTEAD}",
        )
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme)
    check_tied(model, planned)
    FORMATS["gguf"].check_packages()
    stored_tensors(model)


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    weight = layer._parameters.get("weight")
    if swap_of(_plain_class(layer)) is None or weight is None or weight.dim() != 2:
        raise QatkitError(
            f"layer '{name}': 'gguf' supports only linear layers and embeddings, but this is a {type(layer).__name__}",
            advice=f"exclude the layer, or {INSTEAD}",
        )
    if scheme.weight is None:
        raise QatkitError(
            f"layer '{name}': llama.cpp quantizes only the inputs of layers with quantized weights",
            advice=f"set scheme: Q8_0_A8, or exclude the layer, or {INSTEAD}",
        )
    if not scheme.weight.element.scaled:
        if scheme.activation is not None:
            raise QatkitError(
                f"layer '{name}': llama.cpp does not quantize the inputs of F16 weights",
                advice=f"remove activation, or set scheme: Q8_0_A8, or {INSTEAD}",
            )
        return
    inputs = weight.shape[0 if is_transposed(layer) else 1]
    block = block_type_of(scheme.weight)
    if block is not None and inputs % block.block:
        raise QatkitError(
            f"layer '{name}': a block of {block.name} has {block.block} inputs, which does not divide {inputs}",
            advice=f"exclude the layer, or set scheme: MXFP4A16, or {INSTEAD}",
        )
    if block is not None and scheme.activation not in (None, block.activation):
        known = next(each for each, row in SCHEMES.items() if row.activation == block.activation and _fits(row, block))
        raise QatkitError(
            f"layer '{name}': llama.cpp quantizes the inputs of {block.name} weights itself, to 8 bits in groups of "
            f"{block.activation.group_size}, so another trained quantization would not be used",
            advice=f"remove activation, or set scheme: {known}, or {INSTEAD}",
        )
    if block is None:
        problem, advice = _misfit(scheme.weight, inputs)
        raise QatkitError(f"layer '{name}': {problem}", advice=f"{advice}, or {INSTEAD}")


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    return next((kind for kind in type(layer).__mro__ if swap_of(kind) is not None), type(layer))


def _misfit(spec: QuantSpec, inputs: int) -> tuple[str, str]:
    """What differs from the nearest type, and the keys that would fit."""
    nearest = nearest_type(spec, inputs)
    differences = nearest.differences(spec)
    seen = ", ".join(f"{name}: {_yaml(value)}" for name in differences if (value := getattr(spec, name)) is not None)
    needed = ", ".join(f"{name}: {_yaml(getattr(nearest.spec, name))}" for name in differences)
    named = next(name for name, known in SCHEMES.items() if known == Scheme(known.weight) and _fits(known, nearest))
    return f"no GGUF type stores weights with {seen}", f"set scheme: {named}, or weight: {{{needed}}} ({nearest.name})"


def _fits(known: Scheme, block: BlockType) -> bool:
    return known.weight is not None and not block.differences(known.weight)


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a GGUF file with the tokenizer of the data."""
    export_gguf(model, path, context.tokenizer, pooling_of(context.batch))


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the tensors and the metadata of a GGUF file to the model's, and load it with transformers."""
    return compare_and_load(model, path)


def bound(measured: Measured) -> Bound:
    """Return the error bound: 0, or none if activations are quantized, because transformers does not quantize them."""
    if measured.quantizes_inputs:
        return Bound("none, since transformers does not quantize activations", None)
    return EXACT


@torch.no_grad()
def export_gguf(model: nn.Module, path: Path | str, tokenizer: Any = None, pooling: str = "none") -> None:
    """Export a transformers model to a GGUF file with the codes and scales of training.

    Args:
        model: A transformers model, either plain or prepared by `prepare_qat`. It is not changed.
        path: The GGUF file, which is written atomically.
        tokenizer: A fast transformers tokenizer to store in the file, with its chat template. Without a tokenizer, the
            file has no vocabulary, so llama.cpp cannot process text with it.
        pooling: For a BERT, how llama.cpp computes an embedding from hidden states: "none", "mean", "cls" or "last".

    Raises:
        QatkitError: the format does not support the model or the tokenizer.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> from qatkit import prepare_qat, scheme
        >>> from qatkit.models import llama
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64).eval()
        >>> _ = prepare_qat(model, scheme("Q4_0").weight, exclude=["lm_head"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_gguf(model, Path(folder) / "model.gguf")
        ...     loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        >>> tokens = torch.arange(8)[None]
        >>> torch.equal(loaded(tokens).logits, model(tokens).logits)
        True
    """
    check(model, PlannedExport.of(model))
    import gguf

    tensors = stored_tensors(model)
    metadata = file_metadata(model, tensors) | tokenizer_metadata(
        tokenizer, len(cast(Any, model).get_input_embeddings().weight)
    )
    metadata["general.name"] = _name(model, metadata)
    if metadata["general.architecture"] == "bert":
        metadata[POOLING] = pooling_type(pooling)
    with atomic_path(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, metadata["general.architecture"])
        for key, value in metadata.items():
            if key != "general.architecture":  # the writer adds it
                _ADD[type(value)](writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:  # one at a time, so that a file may be larger than the free memory
            writer.write_tensor_data(tensor.data())
        writer.close()


def _name(model: nn.Module, metadata: Mapping[str, Any]) -> str:
    """The name of the model. llama.cpp looks up tokens of Phi-3 in the vocabulary of a model with "phi3" in its name,
    which that of Phi-4 does not have.
    """
    name = type(model).__name__
    tokens = {"</s>", "<s>", "<unk>", "<|endoftext|>"}
    return name if tokens <= set(metadata.get("tokenizer.ggml.tokens", ())) else name.replace("Phi3", "Phi")


_ADD: dict[type, Any] = {
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
    bool: lambda writer, key, value: writer.add_bool(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}
