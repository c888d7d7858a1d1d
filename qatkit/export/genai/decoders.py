"""Which decoders the runtimes onnxruntime-genai and openvino-genai compute as transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.export.interface import PlannedExport

ROPE_TYPES = ("default", "llama3")
"""Types of rotary embeddings that do not depend on the text, and that the builder computes as transformers does."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``config.model_type`` whose layers the builder keeps separate, as in transformers."""


def check_decoder(model: nn.Module, planned: PlannedExport, format: str, runtime: str, instead: str) -> None:
    """Raise an error if a model is not a decoder that both runtimes can hold. Weights are not read.

    Args:
        model: The model.
        planned: Its quantization.
        format: The name of the export format.
        runtime: The runtime, as the subject of a sentence.
        instead: Advice to use another format.

    Raises:
        QatkitError: the architecture, its attention window or rotary embeddings, or the quantization of the KV cache
            is not supported.
    """
    config: Any = getattr(model, "config", None)
    found = getattr(config, "model_type", None)
    if found not in MODEL_TYPES or getattr(model, "lm_head", None) is None:
        what = f"a {type(model).__name__}" if found is None else f"a {type(model).__name__} of model_type '{found}'"
        raise QatkitError(
            f"'{format}' supports only causal language models of model_type {', '.join(MODEL_TYPES)}, "
            f"but the model is {what}",
            advice=instead,
        )
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    if window is not None and window < context:
        raise QatkitError(
            f"the model attends to the last {window} of {context} tokens only, which {runtime} computes differently "
            "from transformers",
            advice=f"set sliding_window: null, or max_position_embeddings: {window}, or {instead}",
        )
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise QatkitError(
            f"'{format}' does not scale rotary embeddings of type '{kind}' as transformers does",
            advice=f"use rope_type: {' or '.join(ROPE_TYPES)}, or {instead}",
        )
    if planned.kv_cache:
        raise QatkitError(
            f"{runtime} stores keys and values in floating point", advice=f"remove kv_cache, or {instead}"
        )


def check_float32(model: nn.Module) -> None:
    """Raise an error if a parameter is not float32, to which the weights are decoded.

    Raises:
        QatkitError: as above.
    """
    for key, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise QatkitError(
                f"'{key}' is {str(parameter.dtype).removeprefix('torch.')}, but the weights are decoded to float32",
                advice="train in float32 (trainer.precision: 32-true or bf16-mixed)",
            )
