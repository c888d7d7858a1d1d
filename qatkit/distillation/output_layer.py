"""The output layer of a causal language model, for losses that do not materialize its logits."""

from __future__ import annotations

from torch import nn


def output_layer(model: nn.Module) -> nn.Linear | None:
    """Return the output layer of a causal language model, if it is a plain linear layer without hooks."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    config = getattr(model, "config", None)
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    return None if getattr(config, "output_router_logits", False) else layer  # experts add their own loss
