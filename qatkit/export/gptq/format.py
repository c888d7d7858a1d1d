"""Export to the checkpoint layouts of GPTQ and AWQ: folders that vLLM, SGLang and transformers load.

Both layouts hold the codes and scales of training. The algorithms that they are named after are not run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.companions import export_config
from qatkit.export.dense import dense_state
from qatkit.export.gptq.content import packed_arrays, quantization_config
from qatkit.export.gptq.layouts import LAYOUTS, Layout
from qatkit.export.gptq.limits import INSTEAD, check_layers, quantized_places
from qatkit.export.gptq.read_back import compare_and_load
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.transformers_folder import quantization_method, quietly
from qatkit.quantization.prepare import qat_layers, strip_qat


def check_gptq(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be stored in GPTQ's layout. Weights are not read.

    Raises:
        QatkitError: the model is not a transformers language model, or the layout does not support the quantization of
            a layer or of the KV cache.
    """
    _check(model, planned, LAYOUTS["gptq"])


def write_gptq(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a folder in GPTQ's layout; `context` is not used."""
    export_packed(model, path, "gptq")


def read_back_gptq(model: nn.Module, path: Path, threads: int | None, python: Path | None) -> ReadBack:
    """Compare the folder's codes, zero points, scales and dequantized weights to the model's, and load it.

    With an interpreter, gptqmodel dequantizes the weights, and transformers computes the outputs with its layers.
    Without one, the weights are decoded by formula, and PyTorch computes the outputs.
    """
    return compare_and_load(model, path, LAYOUTS["gptq"], python)


def bound_gptq(measured: Measured) -> Bound:
    """Return the error bound, 0.01% of the mean output: gptqmodel sums in a different order."""
    return Bound("0.01% of the mean output", 1e-4 * measured.mean_output)


def is_gptq_folder(path: Path) -> bool:
    """Whether a folder contains a model in GPTQ's layout."""
    return quantization_method(path) == "gptq"


def check_awq(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be stored in AWQ's layout. Weights are not read.

    Raises:
        QatkitError: as in `check_gptq`.
    """
    _check(model, planned, LAYOUTS["awq"])


def write_awq(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write a folder in AWQ's layout; `context` is not used."""
    export_packed(model, path, "awq")


def read_back_awq(model: nn.Module, path: Path, threads: int | None, python: Path | None) -> ReadBack:
    """Compare and load the folder, as `read_back_gptq` does."""
    return compare_and_load(model, path, LAYOUTS["awq"], python)


def bound_awq(measured: Measured) -> Bound:
    """Return the error bound, 1% of the mean output: gptqmodel multiplies in float16."""
    return Bound("1% of the mean output", 0.01 * measured.mean_output)


def is_awq_folder(path: Path) -> bool:
    """Whether a folder contains a model in AWQ's layout."""
    return quantization_method(path) == "awq"


def _check(model: nn.Module, planned: PlannedExport, layout: Layout) -> None:
    if not callable(getattr(model, "save_pretrained", None)) or getattr(model, "lm_head", None) is None:
        raise QatkitError(
            f"'{layout.name}' is supported only for transformers language models, but the model is a "
            f"{type(model).__name__}",
            advice="use export: {format: onnx} or {format: dense}",
        )
    if planned.kv_cache:
        raise QatkitError(
            f"'{layout.name}' does not store the quantization of a KV cache", advice=f"remove kv_cache, or {INSTEAD}"
        )
    check_layers(model, planned.schemes, layout)
    quantized_places(model, planned.schemes, layout)


@torch.no_grad()
def export_packed(model: nn.Module, folder: Path | str, layout: str) -> None:
    """Export a transformers language model to a folder in the layout of GPTQ or AWQ, with the codes of training.

    Args:
        model: A model prepared by `prepare_qat`, with scales in float16, or a plain model, which is saved as a plain
            folder. It is not changed.
        folder: The output folder, which is replaced atomically.
        layout: "gptq" or "awq".

    Raises:
        QatkitError: the layout does not support the model.

    Example:
        >>> import tempfile
        >>> from qatkit import QuantSpec, prepare_qat
        >>> from qatkit.models import llama
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64).eval()
        >>> spec = QuantSpec(num_bits=4, strategy="group", group_size=32, scale_dtype="float16")
        >>> _ = prepare_qat(model, spec, exclude=["lm_head"])
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     export_packed(model, Path(parent) / "gptq", "gptq")
        ...     quantization_method(Path(parent) / "gptq")
        'gptq'
    """
    row = LAYOUTS.row(layout, "layout")
    _check(model, PlannedExport.of(model), row)
    plain: Any = copy.deepcopy(model).cpu()
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    plain.config = copy.deepcopy(export_config(plain))
    if config := quantization_config(model, row):
        plain.config.quantization_config = config
    for name, layer in qat_layers(model):
        plain.set_submodule(name, _Packed(packed_arrays(layer, row), plain.get_submodule(name).bias))
    with replaced_folder(Path(folder)) as temporary, quietly():
        plain.save_pretrained(temporary)


class _Packed(nn.Module):
    """The tensors of a quantized layer, for `save_pretrained`."""

    def __init__(self, arrays: dict[str, torch.Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        for name, array in arrays.items():
            self.register_buffer(name, array)
        self.bias = bias
