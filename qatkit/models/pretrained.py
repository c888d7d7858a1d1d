"""Load pretrained transformers models from a folder or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.hub import cannot_load, locate

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

NEW_HEADS = ("Classification", "QuestionAnswering", "MultipleChoice", "SemanticSegmentation", "ForCTC")
"""Suffixes of class names whose head may be new: if the checkpoint has none, its weights are random."""


def causal_lm(
    name_or_path: str,
    dtype: Dtype = "float32",
    attn_implementation: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a pretrained transformers causal language model.

    On torch's meta device, which is used to validate recipes, only the config is read.

    Args:
        name_or_path: A folder written by `save_pretrained` (config.json and weights), or the name of a model on the
            hub, such as "Qwen/Qwen3-0.6B"; an existing folder takes precedence.
        dtype: Dtype of the weights. Use float32 to train all weights; use bf16-mixed precision to speed up computation.
        attn_implementation: Attention implementation of transformers.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: the folder contains no complete model, a weight is non-finite, the model is an encoder, the model
            is not on the hub, access is denied, or the hub cannot be reached.

    Example:
        >>> import tempfile
        >>> from qatkit.models import llama
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1).save_pretrained(folder)
        ...     type(causal_lm(folder)).__name__
        'LlamaForCausalLM'
    """
    model = load("CausalLM", "causal language model", name_or_path, dtype, attn_implementation, gradient_checkpointing)
    config: Any = model.config
    # the config of the built model: only that of BART's decoder says that it is one
    if _fills_in(config.model_type) and not getattr(config, "is_decoder", False):
        raise QatkitError(
            f"'{name_or_path}' is an encoder ({config.model_type}), which also attends to later tokens",
            key="name_or_path",
            advice='use a decoder, or factory: "qatkit.models:masked_lm" with data of qatkit.data:masked_text',
        )
    return model


def masked_lm(
    name_or_path: str,
    dtype: Dtype = "float32",
    attn_implementation: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a pretrained masked language model such as BERT, for `qatkit.data:masked_text`.

    Args:
        name_or_path: A folder or a name on the hub, as in `causal_lm`.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: for the same reasons as in `causal_lm`.
    """
    return load("MaskedLM", "masked language model", name_or_path, dtype, attn_implementation, gradient_checkpointing)


def sequence_classifier(
    name_or_path: str,
    num_classes: int,
    dtype: Dtype = "float32",
    attn_implementation: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a pretrained sequence classifier, for `qatkit.data:text_classification`.

    The weights of the head are random if the model was not trained for classification. A decoder classifies at the last
    token that is not padding. The padding token in the config is set to the padding token of qatkit's data, because
    many configs have a different one or none. It is the tokenizer's padding token, or else its end-of-text token.
    Without a tokenizer, the token in the config is used.

    Args:
        name_or_path: A folder or a name on the hub, as in `causal_lm`.
        num_classes: Number of classes, at least 2.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: for the same reasons as in `causal_lm`, or if the model was trained for a different number of
            classes.
    """
    if num_classes < 2:
        raise QatkitError(f"{num_classes} is out of range", key="num_classes", advice="use 2 or more")
    model = load(
        "SequenceClassification", "sequence classifier", name_or_path, dtype, attn_implementation,
        gradient_checkpointing, num_labels=num_classes,
    )  # fmt: skip
    config: Any = model.config
    if reads_last_token(config.model_type):
        padding = _padding_of(name_or_path)
        if padding is None and config.pad_token_id is None and config.eos_token_id is not None:
            padding = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        if padding is not None:
            config.get_text_config().pad_token_id = padding
    return model


def reads_last_token(model_type: str) -> bool:
    """Whether classifiers of a family are decoders, which use padding to find the last token of a sequence."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return model_type in CAUSAL and not _fills_in(model_type)


def _fills_in(model_type: str) -> bool:
    """Whether models of a family are masked language models, which attend in both directions."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return model_type in MASKED


@lru_cache(maxsize=4)  # a run builds its models many times
def _padding_of(name: str) -> int | None:
    """Return the padding token of a model's tokenizer; None if there is none."""
    source, offline = locate(name, "name_or_path", "config.json and weights", "config.json")
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    except Exception:  # any error of the library; padding is compared later, when the data are known
        return None
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), None)


def embedding_model(
    name_or_path: str,
    dtype: Dtype = "float32",
    attn_implementation: Attention = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a pretrained model without a head, for embeddings with `qatkit.data:text_pairs`.

    Args:
        name_or_path: A folder or a name on the hub, as in `causal_lm`.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: for the same reasons as in `causal_lm`.
    """
    model = load("", "model without a head", name_or_path, dtype, attn_implementation, gradient_checkpointing)
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        pooler.requires_grad_(False)  # embeddings are pooled from hidden states, so it would never get a gradient
    return model


def load(
    kind: str,
    described: str,
    name: str,
    dtype: Dtype,
    attention: Attention | None,
    checkpointing: bool,
    **settings: Any,
) -> nn.Module:
    """Load a transformers model with a head; on the meta device, only the config is read.

    Args:
        kind: The suffix of the name of an ``AutoModelFor`` class; empty for no head.
        described: The kind of model, for errors.
        name: A folder, or a name on the hub.
        dtype: Dtype of the weights.
        attention: Attention implementation; None uses the default of transformers.
        checkpointing: Recompute activations in the backward pass.
        settings: Entries that override the saved config.

    Raises:
        QatkitError: the model cannot be loaded completely, or a weight is non-finite.
    """
    source, offline = locate(name, "name_or_path", "config.json and weights", "config.json")
    if source != name or Path(source).is_dir():
        _check_folder(Path(source))
    import transformers

    factory = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    # without this, transformers would ask on the terminal whether to run the code of a repository
    reading = {"local_files_only": offline, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **reading, **settings)
        if torch.get_default_device().type == "meta":
            model = factory.from_config(config, **options)
        else:
            model, info = factory.from_pretrained(source, config=config, output_loading_info=True, **reading, **options)
            _check_weights(name, model, info["missing_keys"])
    except (QatkitError, MemoryError):
        raise
    except Exception as error:  # a config may have any value anywhere, on which the library fails in any way
        advice = f"use a folder or a hub model that contains a {described}"
        raise cannot_load(error, "name_or_path", name, advice, described) from error
    return ready_to_train(model, checkpointing)


def ready_to_train(model: Any, checkpointing: bool) -> nn.Module:
    """Disable the KV cache, and enable gradient checkpointing if requested.

    Args:
        model: A transformers model.
        checkpointing: Recompute activations in the backward pass.
    """
    model.config.use_cache = False  # training and evaluation see whole sequences
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ready: nn.Module = model
    return ready


def _check_weights(name: str, model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse a model with weights that no file holds, which the library fills with random numbers, or that are NaN."""
    config: Any = model.config
    base = str(getattr(model, "base_model_prefix", ""))
    # a head that is trained on labels may be new, and any model may get a new pooler
    has_new_head = type(model).__name__.endswith(NEW_HEADS)
    lost = sorted(
        key for key in missing if "pooler." not in key and not (has_new_head and not key.startswith(f"{base}."))
    )
    if lost:
        raise QatkitError(
            f"the files of '{name}' lack {len(lost)} weights of a {config.model_type} model, such as '{lost[0]}'",
            key="name_or_path",
            advice="copy the complete model to that folder, or correct its config.json",
        )
    place = next((key for key, value in model.named_parameters() if not bool(value.isfinite().all())), None)
    if place is not None:
        raise QatkitError(
            f"the weight '{place}' of '{name}' has non-finite values",
            key="name_or_path",
            advice="use an intact model, or load the model in the dtype in which it was saved",
        )


def _check_index(path: Path) -> None:
    """Refuse an index of weights that names files outside its folder."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        outside = next((str(file) for file in files if Path(file).name != file), None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise QatkitError(
            f"{path} is not a weight index ({type(error).__name__}: {error})",
            key="name_or_path",
            advice="copy the model's files again",
        ) from error
    if outside is not None:
        raise QatkitError(
            f"{path} refers to '{outside}', which is not a file in its folder",
            key="name_or_path",
            advice="use a folder written by save_pretrained",
        )


def _check_folder(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"the file contains a {type(config).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise QatkitError(
            f"{folder} has no readable config.json ({error})",
            key="name_or_path",
            advice="use a folder written by save_pretrained",
        ) from error
    if not isinstance(config.get("model_type"), str):
        raise QatkitError(
            f"{folder / 'config.json'} has no model_type",
            key="name_or_path",
            advice="use a folder written by save_pretrained of transformers",
        )
    if not [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        raise QatkitError(
            f"{folder} contains no .safetensors file",
            key="name_or_path",
            advice="copy the model's weights to this folder",
        )
    for index in folder.glob("*.index.json"):
        _check_index(index)
