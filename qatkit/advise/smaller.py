"""The smaller model of a plan: the `shrink` block, and the model that it leaves, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qatkit.advise.families import Family
from qatkit.pruning.channel_importance import last_layer
from qatkit.pruning.channels import prune_channels
from qatkit.pruning.layers import PRUNABLE
from qatkit.recipe import ShrinkConfig
from qatkit.stages import shrink

SMALLER = 0.5
"""Fraction of layers or channels that remain."""
NEURONS = 0.75
"""Fraction of the MLP neurons of a language model that remain."""


def shrink_block(model: nn.Module, family: Family) -> dict[str, Any]:
    """Return the ``shrink`` block for a model.

    It removes layers and neurons of a language model, layers of an encoder, and channels of other models.
    """
    config: Any = getattr(model, "config", None)  # an encoder of plain torch has none
    if family not in ("language", "encoder") or not hasattr(config, "get_text_config"):
        return {"channels": SMALLER}
    layers = max(1, round(config.get_text_config().num_hidden_layers * SMALLER))
    return (
        {"layers": layers, "neurons": NEURONS} if family == "language" else {"layers": layers, "layers_by": "uniform"}
    )


def smaller_model(model: nn.Module, family: Family, inputs: Any) -> nn.Module:
    """Return the model that the block leaves.

    The number of parts that are removed does not depend on weights, only the choice of the parts does.

    Args:
        model: The model on the meta device; it is not changed.
        family: Its family.
        inputs: A batch on the meta device, of which the model is traced; not used for language models.

    Raises:
        QatkitError: the model cannot be shrunk.
    """
    config = ShrinkConfig(**shrink_block(model, family))
    smaller = shrink.check(config, model)
    if config.channels is None:
        return smaller
    example = inputs[0][:1]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}
    scores = {name: torch.zeros(len(layer.weight)) for name, layer in layers.items()}
    return prune_channels(model, example, 1 - config.channels, [last_layer(model, example)], scores=scores)
