"""Classification heads, which are trained in full alongside the adapters because their weights may be random."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from qatkit.errors import QatkitError


def classification_heads(model: nn.Module) -> list[str]:
    """Return the modules of a transformers sequence classifier outside its pretrained body, and the body's pooler.

    In a model pretrained to predict tokens, the weights of the pooler are random, as are the weights of the classifier
    after it.

    Args:
        model: A classifier, or a module that contains one; the result is empty for any other model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> classification_heads(BertForSequenceClassification(config))
        ['classifier', 'bert.pooler']
    """
    heads = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("ForSequenceClassification"):
            continue
        classifier: Any = module
        body: str = classifier.base_model_prefix
        parts = [child for child, _ in module.named_children() if child != body]
        if isinstance(getattr(classifier.base_model, "pooler", None), nn.Module):
            parts.append(f"{body}.pooler")
        prefix = f"{name}." if name else ""
        heads += [prefix + part for part in parts if any(True for _ in module.get_submodule(part).parameters())]
    return heads


def inside_of(name: str, parts: Sequence[str]) -> bool:
    """Whether a layer is one of the given modules, or inside one of them."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def check_heads(heads: Sequence[str], held: Collection[str]) -> None:
    """Raise an error if a classification head, which is trained in full, would have to keep a sparsity mask.

    Raises:
        QatkitError: a head has a sparsity mask.
    """
    for name in held:
        if inside_of(name, heads):
            raise QatkitError(
                f"layer '{name}' has a sparsity mask, but LoRA trains the classification head in full, without a mask",
                key="held",
                advice="exclude the layer from pruning, or set hold_sparsity: false",
            )
