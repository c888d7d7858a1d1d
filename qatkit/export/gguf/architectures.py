"""The architectures of GGUF files: layouts and metadata of the models that llama.cpp implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qatkit.common.tables import Table
from qatkit.errors import QatkitError
from qatkit.export.gguf.rope import check_rope, rope_metadata

INSTEAD = "use export: {format: dense}"

_SHAPE = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_DECODER = _SHAPE | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SILU = {"hidden_act": "silu"}
_FULL_ATTENTION = _SILU | {"use_sliding_window": False}


def _head_width(config: Any) -> int:
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def _within_window(config: Any) -> dict[str, Any]:
    """llama.cpp attends to the whole context, which is the same as long as it fits into the sliding window."""
    window = getattr(config, "sliding_window", None)
    return {} if window is None else {"context_length": min(config.max_position_embeddings, window)}


def _gemma3(config: Any) -> dict[str, Any]:
    return {"attention.sliding_window": config.sliding_window}


def _check_gemma3(config: Any) -> str:
    """llama.cpp has fixed choices where the config has settings."""
    pattern = ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(config.num_hidden_layers)]
    if list(config.layer_types) != pattern:
        return "with full attention in every sixth layer, and sliding windows in the others"
    if config.query_pre_attn_scalar != _head_width(config):
        return f"with query_pre_attn_scalar: {_head_width(config)}, the width of a head"
    return ""


def _gpt2(config: Any) -> dict[str, Any]:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd}


@dataclass(frozen=True)
class Architecture:
    """How a transformers model is stored in GGUF."""

    name: str
    """``model_type`` of the transformers config."""
    gguf: str
    """The name of the architecture in GGUF."""
    fields: Mapping[str, str] = field(default_factory=lambda: _DECODER)
    """Attributes of the config by metadata key, without the architecture's prefix."""
    settings: Mapping[str, Any] = field(default_factory=lambda: _SILU)
    """Settings that llama.cpp's implementation assumes, by attribute of the config."""
    more: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Returns metadata that is constant, or computed from the config."""
    problem: Callable[[Any], str] = lambda config: ""
    """Returns what llama.cpp requires, if the config differs from it in a way that `settings` cannot express."""
    permuted: bool = False
    """Whether rows of query and key weights are interleaved, because llama.cpp rotates neighboring pairs."""
    norm_offset: float = 0.0
    """The number that is added to the weights of norms in the file, because llama.cpp does not add it."""
    omitted: str = ""
    """Prefix of parameters that llama.cpp does not use and the file does not contain."""
    loader: str = ""
    """The transformers class that loads the file: the model's own if empty, no class if "none"."""

    def heads(self, key: str, config: Any) -> int:
        """Return the number of heads whose rows are interleaved; 0 if the rows keep their order."""
        layer = key.split(".")[-2] if "." in key else ""
        rows = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
        return rows.get(layer, 0) if self.permuted else 0

    def metadata(self, config: Any) -> dict[str, Any]:
        """Return the metadata that describes a model's shape, by full key; the file stores floats in float32."""
        values = {key: getattr(config, name) for key, name in self.fields.items()}
        rope = rope_metadata(config, _head_width(config))
        return {f"{self.gguf}.{key}": value for key, value in (values | rope | self.more(config)).items()}


ARCHITECTURES = Table(
    "GGUF architecture",
    [
        Architecture("llama", "llama", permuted=True),
        Architecture("mistral", "llama", more=_within_window, permuted=True, loader="LlamaForCausalLM"),
        Architecture("qwen2", "qwen2", settings=_FULL_ATTENTION),
        Architecture("qwen3", "qwen3", settings=_FULL_ATTENTION | {"attention_bias": False}),
        Architecture("phi3", "phi3", more=_within_window),
        Architecture(
            "gemma3_text",
            "gemma3",
            settings={
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
            more=_gemma3,
            problem=_check_gemma3,
            norm_offset=1.0,
        ),
        Architecture(
            "gpt2",
            "gpt2",
            fields=_SHAPE | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
            settings={
                "activation_function": "gelu_new",
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            more=_gpt2,
        ),
        Architecture(
            "bert",
            "bert",
            fields=_SHAPE
            | {"feed_forward_length": "intermediate_size", "attention.layer_norm_epsilon": "layer_norm_eps"},
            settings={"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False},
            more=lambda config: {"attention.causal": False},
            omitted="pooler.",
            loader="none",
        ),
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
    if problem := row.problem(config):
        raise QatkitError(f"llama.cpp implements '{kind}' only {problem}", advice=INSTEAD)
    check_rope(config, INSTEAD)
    return row
