"""The phases of serving and training: prefill and decode of a language model, and the forward pass of other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatkit.advise.roofline import LayerCost, layer_costs, training
from qatkit.advise.serving import cached_numbers
from qatkit.errors import QatkitError
from qatkit.models.pretrained import reads_last_token
from qatkit.run.compatibility import positions_of

Phases = Mapping[str, list[LayerCost]]
"""Layers by phase."""


def served_layers(phases: Phases) -> Sequence[LayerCost]:
    """Return the layers in the call that repeats while serving: the decoding of a token, or the forward pass."""
    return phases["decode"] if "decode" in phases else phases["forward"]


def served_context(model: nn.Module, wanted: int) -> tuple[int, str]:
    """Return the tokens per sequence, at most as many as the model has positions, with a note if they are fewer.

    Args:
        model: A language model.
        wanted: Tokens per sequence.
    """
    longest = positions_of(model)
    if longest is None or wanted <= longest:
        return wanted, ""
    return (
        longest,
        f"the context is {longest:,} tokens instead of {wanted:,}, because the model has {longest:,} positions",
    )


def is_language_model(model: nn.Module) -> bool:
    """Whether a model generates text token by token."""
    config = getattr(model, "config", None)
    return bool(getattr(model, "can_generate", bool)()) and not getattr(config, "is_encoder_decoder", False)


def language_phases(model: nn.Module, batch: int, context: int) -> Phases:
    """Return the costs of a causal language model in prefill, decode and training.

    A decoded token attends to the whole context, so all of the context's keys and values are read.

    Args:
        model: A transformers causal language model on the meta device.
        batch: Number of sequences.
        context: Tokens per sequence.

    Raises:
        QatkitError: the model's config lacks the number of layers or heads, or the model has no attention.
    """
    prefill = _on_tokens(model, batch, context)
    one = _on_tokens(model, batch, 1)
    attentions = sum(layer.between_activations for layer in one)
    if not attentions:
        raise QatkitError(
            f"no attention operation was found in {type(model).__name__}, so the time to read the KV cache is unknown",
            key="MODEL",
            advice="use a model with attention",
        )
    cache = cached_numbers(model) * context * batch // attentions
    decode = [
        replace(layer, flops=layer.flops * context, stored=cache) if layer.between_activations else layer
        for layer in one
    ]
    return {"prefill": prefill, "decode": decode, "training": training(prefill)}


def model_of_config(folder: Path) -> nn.Module:
    """Return the causal language model of a folder with a ``config.json`` on the meta device; weights are not read.

    Raises:
        QatkitError: transformers cannot build a causal language model from the config, or the config is that of an
            encoder, from which it would build one that attends in both directions.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            # some operators of experts exist in bfloat16 only
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise QatkitError(
            f"transformers cannot build a causal language model from this folder: {reason[:300]}",
            key=str(folder),
            advice="pass a folder with the config.json of a causal language model, or a recipe",
        ) from error
    if not reads_last_token(config.model_type) and not getattr(config, "is_decoder", False):
        raise QatkitError(
            f"'{config.model_type}' is not a causal language model",
            key=str(folder),
            advice="pass a recipe with this model and its data",
        )
    return model.eval()


def forward_phases(model: nn.Module, call: Callable[[], object]) -> Phases:
    """Return the costs of any other model in one call and in a training step.

    Args:
        model: A model on the meta device.
        call: Runs it once on one batch.
    """
    forward = layer_costs(model, call)
    return {"forward": forward, "training": training(forward)}


def _on_tokens(model: nn.Module, batch: int, tokens: int) -> list[LayerCost]:
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        # a whole mask is not inspected, which a tensor without values would not allow
        mask = torch.zeros(batch, 1, tokens, tokens, dtype=dtype)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return layer_costs(model, lambda: model(**arguments))
