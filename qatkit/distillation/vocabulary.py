"""Students and teachers of one tokenizer whose logits are padded to different widths."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Protocol

from torch import Tensor

from qatkit.errors import QatkitError

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    @property
    def name_or_path(self) -> str: ...

    def get_vocab(self) -> Mapping[str, int]: ...


def shared_vocab_size(student: Tokenizer, teacher: Tokenizer) -> int:
    """The size of the vocabulary that both have, without the padding that their models add.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.

    Raises:
        QatkitError: the vocabularies differ: logits at one place then stand for different tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise QatkitError(
            f"tokenizers: that of the student ('{student.name_or_path}', {len(ours)} tokens) and that of the teacher "
            f"('{teacher.name_or_path}', {len(theirs)} tokens) differ in {len(different)} tokens, such as "
            f"{different[:3]}; logits can be compared only over one vocabulary. Take a teacher of the student's family"
        )
    return max(ours.values()) + 1


def trim_to_vocabulary(student: Tensor, teacher: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Both sets of logits, without padding where they are padded to different widths.

    Weights ``[vocabulary, hidden]`` can be trimmed as logits are: pass them transposed.

    Args:
        student: Logits ``[..., width]``.
        teacher: Logits ``[..., width]``.
        vocab_size: Tokens of the tokenizer that both use.

    Raises:
        QatkitError: one of them is narrower than the vocabulary.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if min(widths) < vocab_size:
        raise QatkitError(
            f"vocab_size: {vocab_size} tokens, but the student has logits for {widths[0]} and the teacher for "
            f"{widths[1]}; write the size of the tokenizer that both use, at most {min(widths)}"
        )
    if widths[0] == widths[1]:
        return student, teacher
    tell_trimmed(*widths, vocab_size)
    return student[..., :vocab_size], teacher[..., :vocab_size]


@cache  # one line, not one per step
def tell_trimmed(student: int, teacher: int, vocab_size: int) -> None:
    """Say which widths are trimmed to how many tokens."""
    logger.info("logits padded to %d (student) and %d (teacher) are trimmed to %d tokens", student, teacher, vocab_size)
