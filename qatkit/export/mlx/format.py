"""Export to MLX, Apple's array framework: a folder of codes and scales that mlx-lm loads.

The scales are those of training. `mlx_lm.convert` would compute new ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from qatkit.common.files import replaced_folder
from qatkit.errors import QatkitError
from qatkit.export.dense import check as check_tied
from qatkit.export.interface import Bound, ExportContext, Measured, PlannedExport, ReadBack
from qatkit.export.mlx.architectures import INSTEAD, check_architecture, check_float16_embedding
from qatkit.export.mlx.content import config_of, stored_arrays
from qatkit.export.mlx.packing import mode_of, nearest_mode
from qatkit.export.mlx.read_back import compare_and_load
from qatkit.quantization.layers import QATEmbedding, QATLinear
from qatkit.schemes import Scheme


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if MLX cannot store a model exactly, or mlx-lm computes it differently. Weights are not read.

    Raises:
        QatkitError: the architecture, a setting of the config, or the quantization of a layer or of the KV cache is not
            supported.
    """
    check_architecture(model)
    if planned.kv_cache:
        raise QatkitError(
            "'mlx' does not support a quantized KV cache, because mlx-lm quantizes it itself (--kv-bits)",
            advice="remove kv_cache",
        )
    for name, scheme in planned.schemes.items():
        layer = model.get_submodule(name)
        _check_layer(name, layer, scheme)
        if stores_float16(scheme) and layer is cast(Any, model).get_input_embeddings():
            check_float16_embedding(name, model)
    check_tied(model, planned)


def stores_float16(scheme: Scheme) -> bool:
    """Whether MLX decodes a weight to float16, which is then the dtype of an embedding's output."""
    return scheme.weight is not None and scheme.weight.scale_rule == "minimum"


def _check_layer(name: str, layer: nn.Module, scheme: Scheme) -> None:
    kinds = (nn.Linear, nn.Embedding, QATLinear, QATEmbedding)
    if not isinstance(layer, kinds):
        raise QatkitError(
            f"layer '{name}': 'mlx' supports only linear layers and embeddings, but this is a {type(layer).__name__}",
            advice=f"exclude the layer, or {INSTEAD}",
        )
    if scheme.activation is not None:
        raise QatkitError(
            f"layer '{name}': MLX does not quantize activations",
            advice="remove activation, or use a weight-only scheme such as MLX4 or MXFP4A16",
        )
    spec = scheme.weight
    assert spec is not None
    if mode_of(spec) is None:
        mode = nearest_mode(spec)
        raise QatkitError(
            f"layer '{name}': no mode of MLX stores this quantization exactly",
            advice=f"set {mode.problem(spec)} (MLX mode {mode.name}), or use a scheme such as MLX4 or MXFP4A16",
        )
    dtype = cast(Any, layer.weight).dtype
    exact = spec.is_float or dtype == torch.float32 or (dtype == torch.float16 and spec.scale_rule == "minimum")
    if not exact:
        raise QatkitError(
            f"layer '{name}': training rounds the dequantized weights to {str(dtype).removeprefix('torch.')}, but MLX "
            "does not",
            advice="train float32 weights (with trainer.precision: bf16-mixed), or use MXFP4A16",
        )


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Write the folder; `context` is not used."""
    export_mlx(model, path)


def read_back(model: nn.Module, path: Path, threads: int | None, python: Path | None) -> ReadBack:
    """Compare the folder's codes, scales and decoded weights to the model's, and load it.

    With an interpreter, MLX decodes the weights and computes the outputs. Without one, the weights are decoded by
    formula, and PyTorch computes the outputs.
    """
    return compare_and_load(model, path, python)


def bound(measured: Measured) -> Bound:
    """Return the error bound: MLX sums in a different order.

    The mean error may be 1e-4 of the mean output, or 3% in half precision.
    """
    part, text = (0.03, "3%") if measured.half_precision else (1e-4, "0.01%")
    return Bound(f"{text} of the mean output", part * measured.mean_output)


def export_mlx(model: nn.Module, folder: Path | str) -> None:
    """Export a transformers language model to a folder that mlx-lm loads, with the codes and scales of training.

    Args:
        model: The model, either plain or prepared by `prepare_qat`. It is not changed.
        folder: The folder with ``model.safetensors`` and ``config.json``, which is replaced atomically.

    Raises:
        QatkitError: the format does not support the model.

    Example:
        >>> import tempfile
        >>> from qatkit import prepare_qat, scheme
        >>> from qatkit.models import llama
        >>> model = llama(vocab_size=300, hidden=64, layers=1, heads=2, kv_heads=1, intermediate=64).eval()
        >>> _ = prepare_qat(model, scheme("MLX4").weight, exclude=["lm_head"])
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     export_mlx(model, Path(parent) / "mlx")
        ...     sorted(file.name for file in (Path(parent) / "mlx").iterdir())
        ['config.json', 'model.safetensors']
    """
    check(model, PlannedExport.of(model))
    with replaced_folder(Path(folder)) as temporary:
        save_file(stored_arrays(model), temporary / "model.safetensors", metadata={"format": "mlx"})
        text = json.dumps(config_of(model), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(f"{text}\n", encoding="utf-8")
