"""The architectures of GGUF files: tensor names, layouts and metadata.

Tensor names come from the gguf package. llama.cpp computes some operations of an architecture in its own way; the
layout of the tensors takes that into account.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qatkit.common.tables import Table
from qatkit.errors import QatkitError

INSTEAD = "use export: {format: dense}"

_DECODER = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Architecture:
    """How a transformers model is stored in GGUF."""

    name: str
    """``model_type`` of the transformers config."""
    gguf: str
    """The name of the architecture in GGUF."""
    fields: Mapping[str, str] = field(default_factory=lambda: _DECODER)
    """Attributes of the config by metadata key, without the architecture's prefix."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Settings that llama.cpp's implementation assumes, by attribute of the config."""
    permuted: bool = False
    """Whether rows of query and key weights are interleaved, because llama.cpp rotates neighboring pairs."""

    def heads(self, key: str, config: Any) -> int:
        """Return the number of heads whose rows are interleaved; 0 if the rows keep their order."""
        layer = key.split(".")[-2] if "." in key else ""
        rows = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
        return rows.get(layer, 0) if self.permuted else 0

    def metadata(self, config: Any) -> dict[str, Any]:
        """Return the metadata of a model's shape by full key, with floats rounded to float32 by the file."""
        values = {key: getattr(config, name) for key, name in self.fields.items()}
        rotary = getattr(config, "rope_parameters", None)
        if rotary:
            width = _head_width(config)
            values |= {
                "attention.key_length": width,
                "attention.value_length": width,
                "rope.dimension_count": int(width * rotary.get("partial_rotary_factor", 1.0)),
                "rope.freq_base": float(rotary["rope_theta"]),
            }
        window = getattr(config, "sliding_window", None)
        if window is not None:  # llama.cpp attends to the whole context, which is the same within the window
            values["context_length"] = min(values["context_length"], window)
        return {f"{self.gguf}.{key}": value for key, value in values.items()}


ARCHITECTURES = Table(
    "GGUF architecture",
    [
        Architecture("llama", "llama", permuted=True),
    ],
)
"""Every supported architecture by the ``model_type`` of its config."""


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a transformers model.

    Raises:
        QatkitError: the model, or a setting of its config, is not supported in GGUF.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise QatkitError(
            f"'gguf' is supported only for transformers models, but the model is a {type(model).__name__}",
            advice="use export: {format: onnx} or {format: dense}",
        )
    if kind not in ARCHITECTURES:
        raise QatkitError(
            f"'gguf' does not support the architecture '{kind}', only {', '.join(ARCHITECTURES)}",
            advice=INSTEAD,
        )
    row = ARCHITECTURES[kind]
    for name, needed in row.settings.items():
        if (value := getattr(config, name, needed)) != needed:
            raise QatkitError(
                f"llama.cpp implements '{kind}' only with {name}: {needed!r}, but the model has {value!r}",
                advice=INSTEAD,
            )
    rotary = getattr(config, "rope_parameters", None) or {}
    if (rope := rotary.get("rope_type", "default")) != "default":
        raise QatkitError(f"'gguf' does not support rotary embeddings of type '{rope}'", advice=INSTEAD)
    return row


def _head_width(config: Any) -> int:
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width
