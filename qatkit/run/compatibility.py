"""Whether data and model belong together: what would otherwise be an index out of range in the middle of training."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.hub import holds_tokenizer
from qatkit.models.pretrained import reads_last_token
from qatkit.recipe import FactoryConfig
from qatkit.recipe.factories import resolve


def check_data(model: nn.Module, data: Any) -> None:
    """Compare what data and model say of themselves; those that say nothing are taken as they are.

    Args:
        model: A model of transformers, or any other.
        data: A data module, perhaps with a ``tokenizer``, ``classes``, a ``context``, ``packed`` and ``padding``.

    Raises:
        QatkitError: tokens, classes, padding, length or packing of the data are not those of the model.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return
    tokenizer = getattr(data, "tokenizer", None)
    known = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and known is not None and len(tokenizer) > known:
        raise QatkitError(
            f"data: its tokenizer has {len(tokenizer)} tokens, and the model's vocabulary {known}; write the tokenizer "
            "that the model was trained with"
        )
    classes = getattr(data, "classes", None)
    if classes is not None and config.num_labels != len(classes):
        raise QatkitError(
            f"data.args.classes: they are {len(classes)}, and the model has {config.num_labels} outputs; write "
            f"model.args.num_classes: {len(classes)}"
        )
    padding, theirs = getattr(data, "padding", None), config.get_text_config().pad_token_id
    if classes is not None and padding is not None and padding != theirs and reads_last_token(config.model_type):
        raise QatkitError(
            f"data.args.tokenizer: it fills rows up with token {padding}, and the model, which reads the class off the "
            f"last token that is no padding, takes {theirs} for it; write the tokenizer that the model was trained "
            f"with, or pad_token_id: {padding} into the model's config.json"
        )
    context = getattr(data, "context", None)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest is not None and context > longest:
        raise QatkitError(
            f"data.args.context: {context} is longer than the {longest} positions of the model; write {longest} or less"
        )
    attention = str(getattr(config, "_attn_implementation", ""))
    if getattr(data, "packed", False) and "flash" in attention and data.batch_size > 1:
        raise QatkitError(
            f"data: with attn_implementation {attention} documents of a window are only kept apart in batches of 1; "
            "write batch_size: 1 and a larger context, or sdpa"
        )


def with_tokenizer(data: FactoryConfig, model: FactoryConfig, allow: Sequence[str] = ()) -> FactoryConfig:
    """The data of a recipe, with the tokenizer of its pretrained model where they name none and take one.

    Another tokenizer's numbers would mean other texts to the model.
    """
    name = model.args.get("name_or_path") if model.factory.startswith("qatkit.models:") else None
    if not isinstance(name, str) or "tokenizer" in data.args or not holds_tokenizer(name):
        return data
    parameter = inspect.signature(resolve(data.factory, "data.factory", allow)).parameters.get("tokenizer")
    if parameter is None or parameter.default not in (None, inspect.Parameter.empty):
        return data
    return dataclasses.replace(data, args={**data.args, "tokenizer": name})
