"""transformers models of any family with any head, either pretrained or with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitError, did_you_mean
from qatkit.models.pretrained import Attention, Dtype, load, ready_to_train

_NOT_ENTRIES = {
    "model_type", "name_or_path", "transformers_version", "dtype", "attn_implementation", "experts_implementation",
}  # fmt: skip
"""Attributes of a config that have their own argument, or that a recipe must not set."""


def pretrained_model(
    name_or_path: str,
    head: str,
    num_classes: int | None = None,
    dtype: Dtype = "float32",
    attn_implementation: Attention | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Load a pretrained transformers model with any head, for text, images, speech or multiple modalities.

    `causal_lm`, `masked_lm`, `sequence_classifier` and `embedding_model` also check that the model is compatible with
    qatkit's data.

    Args:
        name_or_path: A folder or a name on the hub, as in `causal_lm`.
        head: The suffix of the name of an ``AutoModelFor`` class, such as "TokenClassification", "QuestionAnswering",
            "Seq2SeqLM", "ImageClassification", "SemanticSegmentation" or "SpeechSeq2Seq". "Model" loads the model
            without a head; use it also for dual encoders such as CLIP.
        num_classes: Number of classes of a classification head. The default is the number in the saved config.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers; the default depends on the family.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: for the same reasons as in `causal_lm`, or if the head is unknown or does not exist for the family.

    Example:
        >>> import tempfile
        >>> bert = untrained_model("bert", "Model", {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bert.save_pretrained(folder)
        ...     pretrained_model(folder, "TokenClassification", num_classes=5).classifier.out_features
        5
    """
    _check_head(head)
    return load(
        "" if head == "Model" else head, f"model with the head {head}" if head != "Model" else "model without a head",
        name_or_path, dtype, attn_implementation, gradient_checkpointing, **_classes(num_classes),
    )  # fmt: skip


def untrained_model(
    family: str,
    head: str,
    config: dict[str, Any] | None = None,
    num_classes: int | None = None,
    dtype: Dtype = "float32",
    attn_implementation: Attention | None = None,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """Build a transformers model with random weights.

    Args:
        family: The ``model_type`` of a config, such as "bert", "vit", "whisper" or "clip".
        head: As in `pretrained_model`.
        config: Entries of the config that differ from the family's defaults, such as ``{"hidden_size": 64}``. Entries
            of a submodel are nested, such as ``{"text_config": {"hidden_size": 64}}``.
        num_classes: Number of classes of a classification head. The default is the number in the config.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers; the default depends on the family.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.

    Raises:
        QatkitError: the family, the head or an entry is unknown; the head does not exist for the family; or
            transformers cannot build the model.

    Example:
        >>> import torch
        >>> config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
        >>> vit = untrained_model("vit", "ImageClassification", config, num_classes=3)
        >>> vit(torch.zeros(2, 3, 32, 32)).logits.shape
        torch.Size([2, 3])
    """
    _check_head(head)
    import transformers

    # the name is in the module, but not in its __all__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    if family not in CONFIG_MAPPING_NAMES:
        raise QatkitError(
            f"unknown family '{family}'", key="family", advice=did_you_mean(family, sorted(CONFIG_MAPPING_NAMES))
        )
    entries = (config or {}) | _classes(num_classes)
    _check_entries(config or {}, transformers.AutoConfig.for_model(family), "config")
    try:
        built = transformers.AutoConfig.for_model(family, **entries)
        # named, so that an entry of the config cannot choose code from the hub
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
        model = _auto_class(head).from_config(built, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # an entry may have any value, on which the library fails in any way
        raise QatkitError(
            f"transformers cannot build a '{family}' model with the head {head} ({' '.join(str(error).split())[:300]})",
            key="config",
            advice="correct the entry, or use a head that this family supports",
        ) from error
    return ready_to_train(model, gradient_checkpointing)


def _check_head(head: str) -> None:
    from transformers.models.auto import modeling_auto

    heads = ["Model", *(name.removeprefix("AutoModelFor") for name in dir(modeling_auto) if "AutoModelFor" in name)]
    if head not in heads:
        raise QatkitError(f"unknown head '{head}'", key="head", advice=did_you_mean(head, heads))


def _auto_class(head: str) -> Any:
    import transformers

    return getattr(transformers, "AutoModel" if head == "Model" else f"AutoModelFor{head}")


def _classes(number: int | None) -> dict[str, int]:
    if number is not None and number < 1:
        raise QatkitError(f"{number} is out of range", key="num_classes", advice="use a positive integer")
    return {} if number is None else {"num_labels": number}


def _check_entries(entries: Mapping[str, Any], config: Any, key: str) -> None:
    """Refuse entries that the family does not have, which transformers would keep without using them."""
    known = {*config.to_dict(), *config.attribute_map} - _NOT_ENTRIES
    known |= {"decoder_start_token_id"} if config.is_encoder_decoder else set()
    for name, value in entries.items():
        place, own = f"{key}.{name}", getattr(config, name, None)
        if (
            name.startswith("_")
            or name in _NOT_ENTRIES
            or not (name in known or hasattr(config, name))
            or callable(own)
        ):
            allowed = [each for each in known if not each.startswith("_")]
            raise QatkitError(
                "the config of this family has no such entry", key=place, advice=did_you_mean(name, allowed)
            )
        if name.startswith("backbone") or name in ("use_timm_backbone", "use_pretrained_backbone"):
            raise QatkitError(
                "this entry would load code or weights of other packages",
                key=place,
                advice="remove it, or use pretrained_model",
            )
        if isinstance(value, Mapping) and hasattr(own, "to_dict"):
            _check_entries(value, own, place)
