"""Export to onnxruntime-genai: a folder with a decoder in ONNX that keeps a cache of keys and values.

The model builder of onnxruntime-genai writes the graph in floating point. The weights of quantized layers are then
replaced with the trained codes and scales (`qatkit.export.genai.graph`), because the builder would compute new scales.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.dense import check as check_tied
from qatkit.export.dense import dense_state
from qatkit.export.formats import FORMATS
from qatkit.export.genai.decoders import check_decoder, check_float32
from qatkit.export.genai.graph import CONFIG, GRAPH, pack_graph
from qatkit.export.genai.runtime import compare_and_load
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.onnx.format import bound as onnx_bound
from qatkit.export.onnx.packed import GATHER_BLOCKS, MATMUL_BLOCKS, PackedEmbedding, packed_class, packing_of
from qatkit.quantization.layers import swap_of
from qatkit.quantization.prepare import strip_qat
from qatkit.schemes import Scheme

_INSTEAD = "use export: {format: gguf} or {format: compressed_tensors}"


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported for onnxruntime-genai. Weights are not read.

    Raises:
        QatkitError: the model's architecture or the quantization of a layer or of the KV cache is not supported, or a
            package is missing.
    """
    check_decoder(model, planned, "onnx_genai", "onnxruntime-genai", _INSTEAD)
    for name, scheme in planned.schemes.items():
        _check_layer(name, model.get_submodule(name), scheme)
    check_float32(model)
    check_tied(model, planned)
    FORMATS["onnx_genai"].check_packages()


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    kind = next((swap for base in type(layer).__mro__ if (swap := swap_of(base)) is not None), None)
    gathered = packed_class(kind) is PackedEmbedding
    weight = cast(torch.Tensor, layer._parameters["weight"])
    if packing_of(kind, weight.shape[1], scheme) is None:
        sizes = ", ".join(str(size) for size in (GATHER_BLOCKS[:5] if gathered else MATMUL_BLOCKS))
        bits = "2, 4 or 8" if gathered else "at most 4"
        raise QatkitError(
            f"layer '{name}': 'onnx_genai' supports only linear layers and embeddings with integer weights of {bits} "
            "bits, and activations that are not quantized or have 8 bits in groups",
            advice=f"set weight: {{num_bits: 4, strategy: group, group_size: G}} where G is one of {sizes}, "
            f"or exclude the layer, or {_INSTEAD}",
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an error if there is no tokenizer: onnxruntime-genai cannot open a folder without one.

    Raises:
        QatkitError: the tokenizer is None.
    """
    if tokenizer is None:
        raise QatkitError(
            "'onnx_genai' stores a tokenizer beside the model, but the data has none",
            advice="use text data such as qatkit.data:text, or pass tokenizer=, or use export: {format: dense}",
        )


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write the folder with the tokenizer of the data."""
    export_genai(model, path, context.tokenizer)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the folder's codes, scales and parameters to the model's, and load it into ONNX Runtime."""
    return compare_and_load(model, path, threads)


def bound(measured: Measured) -> Bound:
    """Return the error bound, which is that of the format ``onnx``."""
    return onnx_bound(measured)


def is_genai_folder(path: Path) -> bool:
    """Whether a folder contains a model for onnxruntime-genai."""
    return (path / CONFIG).is_file()


@torch.no_grad()
def export_genai(model: nn.Module, folder: Path | str, tokenizer: Any) -> None:
    """Export a causal language model to a folder that onnxruntime-genai loads, with the codes and scales of training.

    The model builder of onnxruntime-genai runs in a separate process and needs enough disk space for two copies of the
    floating-point weights.

    Args:
        model: A transformers model, either plain or prepared by `prepare_qat`. It is not changed.
        folder: The output folder, which is replaced atomically.
        tokenizer: A transformers tokenizer, which is stored in the folder. Its special tokens mark the end of a text.

    Raises:
        QatkitError: the format does not support the model, there is no tokenizer, or the builder failed.
    """
    check(model, PlannedExport.of(model))
    check_tokenizer(tokenizer)
    model = copy.deepcopy(model).cpu().eval()
    plain = copy.deepcopy(model)
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    plain.config = _config(plain, model, tokenizer)
    with replaced_folder(Path(folder)) as temporary, tempfile.TemporaryDirectory() as scratch:
        source, built = Path(scratch) / "source", Path(scratch) / "built"
        cast(Any, plain).save_pretrained(source)
        tokenizer.save_pretrained(source)
        del plain
        _build(source, built)
        pack_graph(model, built / GRAPH, temporary / GRAPH)
        config = json.loads((built / CONFIG).read_text(encoding="utf-8"))
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in built.iterdir():
            if file.name not in (CONFIG, GRAPH, f"{GRAPH}.data"):
                shutil.copy(file, temporary)


def _config(plain: nn.Module, model: nn.Module, tokenizer: Any) -> Any:
    """The config for the builder: special tokens from the tokenizer, and untied weights if they are quantized."""
    config = copy.deepcopy(cast(Any, plain.config))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, key, None) is None:
            setattr(config, key, getattr(tokenizer, key, None))
    if getattr(config, "tie_word_embeddings", False) and "lm_head" in PlannedExport.of(model).schemes:
        config.tie_word_embeddings = False
        output = cast(Any, plain).get_output_embeddings()
        output.weight = nn.Parameter(output.weight.clone())
    return config


def _build(source: Path, built: Path) -> None:
    """Run the model builder of onnxruntime-genai in a process of its own: it prints, and changes `sys.path`."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(built)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(source), "--extra_options", "fuse_qkv=false"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source, check=False)
    if done.returncode != 0 or not (built / GRAPH).is_file():
        lines = done.stderr.strip().splitlines() or ["no error message"]
        raise QatkitError(
            f"the model builder of onnxruntime-genai failed: {lines[-1]}",
            advice=f"open an issue with onnxruntime-genai that includes the model's config, or {_INSTEAD}",
        )
