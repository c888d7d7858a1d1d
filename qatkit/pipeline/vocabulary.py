"""The shared vocabulary of a student and its teacher."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch import nn

from qatkit.distillation.vocabulary import Tokenizer, shared_vocab_size
from qatkit.errors import QatkitError


def vocabulary(student: nn.Module, teacher: nn.Module, data: LightningDataModule, stage: str) -> int | None:
    """Return the shared vocabulary size of two language models whose logits are padded to different widths, else None.

    Args:
        student: The student.
        teacher: The teacher.
        data: The data module. Its attribute ``tokenizer``, if it exists, is used for models without a tokenizer.
        stage: The stage's name, for errors.

    Raises:
        QatkitError: the tokenizers differ or are unknown.
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
            f"the student returns {widths[0]} logits per token and the teacher {widths[1]}, and no tokenizer defines "
            "their shared vocabulary",
            key=key,
            advice="set an attribute 'tokenizer' on the data module",
        )
    try:
        size = shared_vocab_size(tokenizers[0], tokenizers[1])
    except QatkitError as error:
        raise error.with_fields(key=key) from None
    return size if widths[0] != widths[1] else None


def _width(model: nn.Module) -> int | None:
    get = getattr(model, "get_output_embeddings", None)
    return getattr(get() if get is not None else None, "out_features", None)


def _tokenizer(model: nn.Module) -> Tokenizer | None:
    """The tokenizer in the folder of a pretrained model; None if there is none."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    return tokenizer
