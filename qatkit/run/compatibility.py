"""Check that data and model are compatible; a mismatch would otherwise cause an index error during training."""

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
    """Compare the attributes of data and model; missing attributes are skipped.

    Args:
        model: A transformers model, or any other module.
        data: A data module, with any of the attributes ``tokenizer``, ``classes``, ``context``, ``packed`` and
            ``padding``.

    Raises:
        QatkitError: the tokens, classes, padding, length or packing of the data do not match the model.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return
    tokenizer = getattr(data, "tokenizer", None)
    known = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and known is not None and len(tokenizer) > known:
        raise QatkitError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary has {known}",
            key="data",
            advice="use the model's tokenizer",
        )
    classes = getattr(data, "classes", None)
    if classes is not None and config.num_labels != len(classes):
        raise QatkitError(
            f"{len(classes)} classes do not match the {config.num_labels} outputs of the model",
            key="data.args.classes",
            advice=f"set model.args.num_classes: {len(classes)}",
        )
    padding, theirs = getattr(data, "padding", None), getattr(config.get_text_config(), "pad_token_id", None)
    if classes is not None and padding is not None and padding != theirs and reads_last_token(config.model_type):
        raise QatkitError(
            f"the data is padded with token {padding}, but the model, which reads the class from the last token "
            f"before the padding, expects token {theirs}",
            key="data.args.tokenizer",
            advice=f"use the model's tokenizer, or set pad_token_id: {padding} in the model's config.json",
        )
    context = getattr(data, "context", None)
    longest = positions_of(model)
    if context is not None and longest is not None and context > longest:
        raise QatkitError(
            f"{context} exceeds the model's {longest} positions",
            key="data.args.context",
            advice=f"use {longest} or less",
        )
    attention = str(getattr(config, "_attn_implementation", ""))
    if getattr(data, "packed", False) and "flash" in attention and data.batch_size > 1:
        raise QatkitError(
            f"attn_implementation {attention} separates packed documents only with batch_size 1",
            key="data",
            advice="use batch_size: 1 and a larger context, or attn_implementation sdpa",
        )


def positions_of(model: nn.Module) -> int | None:
    """Return the maximum sequence length of a transformers model in tokens; None if it is unknown."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def with_tokenizer(data: FactoryConfig, model: FactoryConfig, allow: Sequence[str] = ()) -> FactoryConfig:
    """Add the tokenizer of a recipe's pretrained model to its data, if the data accepts a tokenizer and sets none.

    With a different tokenizer, the token IDs would have a different meaning.
    """
    name = model.args.get("name_or_path") if model.factory.startswith("qatkit.models:") else None
    if not isinstance(name, str) or "tokenizer" in data.args or not holds_tokenizer(name):
        return data
    parameter = inspect.signature(resolve(data.factory, "data.factory", allow)).parameters.get("tokenizer")
    if parameter is None or parameter.default not in (None, inspect.Parameter.empty):
        return data
    return dataclasses.replace(data, args={**data.args, "tokenizer": name})
