"""Padded vocabularies of one tokenizer, and tokenizers that differ."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qatkit import QatkitError
from qatkit.distillation.losses import kd_loss
from qatkit.distillation.vocabulary import shared_vocab_size, trim_to_vocabulary


def tokenizer(name: str, words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words.split())}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), name_or_path=name
    )


def test_one_tokenizer_with_two_paddings_is_trimmed_to_its_size_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = shared_vocab_size(tokenizer("small", "a b c d"), tokenizer("large", "a b c d"))
    assert size == 4
    student, teacher = torch.randn(3, 6), torch.randn(3, 9)
    with caplog.at_level(logging.INFO, logger="qatkit"):
        for _ in range(3):
            trimmed = trim_to_vocabulary(student, teacher, size)
    assert torch.equal(kd_loss(*trimmed), kd_loss(student[:, :4], teacher[:, :4]))
    assert caplog.messages == ["logits padded to 6 (student) and 9 (teacher) are trimmed to 4 tokens"]


def test_equal_widths_stay_as_they_are() -> None:
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    assert trim_to_vocabulary(student, teacher, 4) == (student, teacher)


def test_a_vocabulary_wider_than_the_logits_is_refused_with_all_sizes() -> None:
    with pytest.raises(
        QatkitError, match=r"vocab_size: 8 exceeds .* the student \(6\) or the teacher \(9\); .* at most 6"
    ):
        trim_to_vocabulary(torch.randn(3, 6), torch.randn(3, 9), 8)


@pytest.mark.parametrize("words", ["a b c", "b a c d", "a b c e"])
def test_tokenizers_that_differ_are_refused_with_both_names_and_sizes(words: str) -> None:
    other = tokenizer("other/model", words)
    count = len(words.split())
    with pytest.raises(QatkitError, match=rf"'own/model', 4 tokens\) .* \('other/model', {count} tokens\) differ in"):
        shared_vocab_size(tokenizer("own/model", "a b c d"), other)


def test_a_tokenizer_that_was_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    saved = tokenizer("saved", "a b c d")
    saved.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert shared_vocab_size(saved, loaded) == 4
