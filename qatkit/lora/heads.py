"""What of a classifier is trained whole beside adapters: a head with random weights cannot be learned by an update."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from qatkit.errors import QatkitError


def classification_heads(model: nn.Module) -> list[str]:
    """The parts of a transformers sequence classifier that are not its pretrained body, and the body's pooler.

    A pooler is part of it: of a model that was trained to predict tokens it is as random as the layer behind it.

    Args:
        model: A classifier, or what holds one; of any other model nothing is trained whole.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> classification_heads(BertForSequenceClassification(config))
        ['classifier', 'bert.pooler']
    """
    found = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("ForSequenceClassification"):
            continue
        classifier: Any = module
        body: str = classifier.base_model_prefix
        parts = [child for child, _ in module.named_children() if child != body]
        if isinstance(getattr(classifier.base_model, "pooler", None), nn.Module):
            parts.append(f"{body}.pooler")
        prefix = f"{name}." if name else ""
        found += [prefix + part for part in parts if any(True for _ in module.get_submodule(part).parameters())]
    return found


def inside_of(name: str, parts: Sequence[str]) -> bool:
    """Whether a layer is one of the parts or in one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def check_heads(heads: Sequence[str], held: Collection[str]) -> None:
    """Raise where zeros are to be held in what is trained whole.

    Raises:
        QatkitError: names the layer.
    """
    for name in held:
        if inside_of(name, heads):
            raise QatkitError(
                f"layer '{name}': its zeros are held, and LoRA trains the head of a classifier whole, which would fill "
                "them; exclude it from pruning, or write hold_sparsity: false"
            )
