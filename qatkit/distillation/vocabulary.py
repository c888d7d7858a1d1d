"""Trim student and teacher logits to the shared vocabulary if they are padded to different widths."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Protocol

from torch import Tensor

from qatkit.errors import QatkitError

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """The part of the transformers tokenizer interface that is used here."""

    @property
    def name_or_path(self) -> str: ...

    def get_vocab(self) -> Mapping[str, int]: ...


def shared_vocab_size(student: Tokenizer, teacher: Tokenizer) -> int:
    """Return the size of the shared vocabulary, without the padding that models add.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.

    Raises:
        QatkitError: the vocabularies differ, so a logit index refers to different tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise QatkitError(
            f"the student's tokenizer ('{student.name_or_path}', {len(ours)} tokens) and the teacher's "
            f"('{teacher.name_or_path}', {len(theirs)} tokens) differ in {len(different)} tokens, such as "
            f"{different[:3]}; logits can be compared only over the same vocabulary",
            advice="use a teacher from the student's model family",
        )
    return max(ours.values()) + 1


def trim_to_vocabulary(student: Tensor, teacher: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Trim both sets of logits to the vocabulary if they are padded to different widths.

    Weights ``[vocabulary, hidden]`` are trimmed in the same way: pass them transposed.

    Args:
        student: Logits ``[..., width]``.
        teacher: Logits ``[..., width]``.
        vocab_size: Number of tokens in the shared tokenizer.

    Raises:
        QatkitError: the logits of one model are narrower than the vocabulary.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if min(widths) < vocab_size:
        raise QatkitError(
            f"{vocab_size} exceeds the number of logits of the student ({widths[0]}) or the teacher ({widths[1]})",
            key="vocab_size",
            advice=f"use the size of the shared tokenizer, at most {min(widths)}",
        )
    if widths[0] == widths[1]:
        return student, teacher
    log_trimmed(*widths, vocab_size)
    return student[..., :vocab_size], teacher[..., :vocab_size]


@cache  # log one line, not one per step
def log_trimmed(student: int, teacher: int, vocab_size: int) -> None:
    """Log the padded widths and the vocabulary size to which they are trimmed."""
    logger.info("logits padded to %d (student) and %d (teacher) are trimmed to %d tokens", student, teacher, vocab_size)
