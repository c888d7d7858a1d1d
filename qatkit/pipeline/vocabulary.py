"""The tokens that a student and its teacher share."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch import nn

from qatkit.distillation.vocabulary import Tokenizer, shared_vocab_size
from qatkit.errors import QatkitError


def vocabulary(student: nn.Module, teacher: nn.Module, data: LightningDataModule, stage: str) -> int | None:
    """Tokens that two language models share where their logits are padded to different widths; else None.

    Args:
        student: The model that trains.
        teacher: The model that teaches.
        data: May have the tokenizer that both read, as ``tokenizer``.
        stage: For errors.

    Raises:
        QatkitError: their tokenizers differ, or are not known.
    """
    widths = [_width(model) for model in (student, teacher)]
    if None in widths:
        return None
    tokenizers = [_tokenizer(model) or getattr(data, "tokenizer", None) for model in (student, teacher)]
    key = f"stages.{stage}.distill.teacher"
    if tokenizers[0] is None or tokenizers[1] is None:
        if widths[0] == widths[1]:
            return None
        raise QatkitError(
            f"{key}: the student has logits for {widths[0]} tokens and the teacher for {widths[1]}, and no tokenizer "
            "is known that both use; give the data module an attribute 'tokenizer'"
        )
    try:
        size = shared_vocab_size(tokenizers[0], tokenizers[1])
    except QatkitError as error:
        raise error.under(key) from None
    return size if widths[0] != widths[1] else None


def _width(model: nn.Module) -> int | None:
    get = getattr(model, "get_output_embeddings", None)
    return getattr(get() if get is not None else None, "out_features", None)


def _tokenizer(model: nn.Module) -> Tokenizer | None:
    """That of a pretrained model, where one is beside its weights."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        return None
    from transformers import AutoTokenizer

    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    return found
