"""Export to openvino-genai: a folder with a stateful decoder, trained integer weights and the tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkit.common.files import replaced_folder
from qatkit.export.dense import dense_state
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.onnx.format import bound as onnx_bound
from qatkit.export.openvino_genai.graph import converted
from qatkit.export.openvino_genai.limits import check as check
from qatkit.export.openvino_genai.limits import check_tokenizer as check_tokenizer
from qatkit.export.openvino_genai.limits import converted_tokenizer
from qatkit.export.openvino_genai.read_back import GRAPH, compare_and_load
from qatkit.quantization.prepare import strip_qat


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write the folder with the tokenizer of the data."""
    export_openvino_genai(model, path, context.tokenizer)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the folder's codes, scales and parameters to the model's, and load it into OpenVINO."""
    return compare_and_load(model, path, threads)


def bound(measured: Measured) -> Bound:
    """Return the error bound, which is that of the format ``onnx``."""
    return onnx_bound(measured)


def is_openvino_genai_folder(path: Path) -> bool:
    """Whether a folder contains a model for openvino-genai."""
    return (path / GRAPH).is_file()


@torch.no_grad()
def export_openvino_genai(model: nn.Module, folder: Path | str, tokenizer: Any) -> None:
    """Export a causal language model to a folder that openvino-genai loads, with the codes and scales of training.

    Args:
        model: A transformers model, either plain or prepared by `prepare_qat`. It is not changed.
        folder: The output folder, which is replaced atomically.
        tokenizer: A transformers tokenizer, which is stored in the folder as OpenVINO models.

    Raises:
        QatkitError: the format does not support the model or the tokenizer.
    """
    import openvino

    check(model, PlannedExport.of(model))
    models = dict(zip(("tokenizer", "detokenizer"), converted_tokenizer(tokenizer), strict=True))
    model = copy.deepcopy(model).cpu().eval()
    plain = copy.deepcopy(model)
    strip_qat(plain)
    plain.load_state_dict(dense_state(model))
    with replaced_folder(Path(folder)) as temporary:
        openvino.serialize(converted(plain, model), temporary / GRAPH)
        for name, made in models.items():
            openvino.save_model(made, temporary / f"openvino_{name}.xml", compress_to_fp16=False)
