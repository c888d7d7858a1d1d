"""The tokenizer in a GGUF file: transformers rebuilds it from the file alone, and another one is found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qatkit import QatkitError
from qatkit.export.gguf.format import export_gguf
from qatkit.export.gguf.read_back import compare_tokenizer
from qatkit.export.gguf.tokenizer import SPLITS, check_tokenizer, tokenizer_metadata
from qatkit.models import llama

TEXTS = ["The quick brown fox, isn't it?", "  two spaces\n\tand 12345 tabs", "naïve 狐 <|end|> done", "lazy dogs"] * 3
REBUILDS = "transformers.integrations.gguf.gguf_tokenizer_mapping"
"""Older versions rebuild byte-level tokenizers only for a few architectures, and never in llama.cpp's way."""
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"


def wrapped(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(split: str = "", vocab_size: int = 290, texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = whole
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), whole])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: bytes for unknown characters, and <s> before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens)
    tokenizer.train_from_iterator(["the quick brown fox", "lazy dogs and tabs"] * 4, trainer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def exported(tokenizer: Any, folder: Path) -> Path:
    export_gguf(llama(400, 32, 1, 2, 1, 32, 16), folder / "model.gguf", tokenizer)
    return folder / "model.gguf"


@pytest.mark.parametrize(("split", "name"), [item for item in SPLITS.items() if item[0]])
def test_transformers_splits_text_in_the_same_way_under_llama_cpps_name(split: str, name: str) -> None:
    table = pytest.importorskip(REBUILDS)
    assert table.GGUF_PRE_TOKENIZER_SPLITS[name] == split


@pytest.mark.parametrize("split", list(SPLITS), ids=list(SPLITS.values()))
def test_transformers_rebuilds_a_byte_level_tokenizer_with_its_chat_template(split: str, tmp_path: Path) -> None:
    pytest.importorskip(REBUILDS)
    tokenizer = byte_level(split)
    path = exported(tokenizer, tmp_path)
    rebuilt = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert [rebuilt(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert (rebuilt.eos_token, rebuilt.chat_template) == ("<|end|>", TEMPLATE)
    assert compare_tokenizer(path, tokenizer) == []


def test_transformers_rebuilds_a_sentencepiece_tokenizer_with_its_first_token(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    path = exported(tokenizer, tmp_path)
    rebuilt = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("the quick fox", "lazy dogs, naïve 狐"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert rebuilt(text, add_special_tokens=False)["input_ids"] == ids[1:]
    values = tokenizer_metadata(tokenizer, 400)
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert values["tokenizer.ggml.tokens"][-1] == "[PAD399]"
    assert values["tokenizer.ggml.token_type"][-1] == 5


def test_another_tokenizer_template_or_none_is_found_by_its_key(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = exported(tokenizer, tmp_path)
    other = byte_level(texts=["other words entirely", "and more words"] * 4)
    first = compare_tokenizer(path, other)[0]
    assert first.startswith("metadata 'tokenizer.ggml.merges'[0] is "), first
    other = byte_level()
    other.chat_template = TEMPLATE.replace("user", "human")
    assert compare_tokenizer(path, other)[0].startswith("metadata 'tokenizer.chat_template' is ")
    assert compare_tokenizer(path, None)[0] == (
        "metadata 'tokenizer.ggml.model' is 'gpt2', but 'no_vocab' in the trained model"
    )
    assert compare_tokenizer(exported(None, tmp_path), None) == []
    assert compare_tokenizer(path, tokenizer)[0].startswith("metadata 'tokenizer.ggml.model' is 'no_vocab'")


def test_a_tokenizer_that_llama_cpp_does_not_support_is_refused() -> None:
    words = wrapped(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(QatkitError, match=r"model WordLevel in a GGUF file; use export: \{format: dense\}"):
        check_tokenizer(words)
    with pytest.raises(QatkitError, match=r"is known to split text as this tokenizer does .*'\\\\d\+'"):
        check_tokenizer(byte_level(r"\d+"))
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(QatkitError, match="the tokenizer's normalizer Lowercase"):
        check_tokenizer(lower)
    with pytest.raises(QatkitError, match="has 290 tokens, but the model has 64 embeddings"):
        tokenizer_metadata(byte_level(), 64)
    with pytest.raises(QatkitError, match="the tokenizer has no merges"):
        check_tokenizer(byte_level(vocab_size=257))
    check_tokenizer(None)


@pytest.mark.parametrize(("behavior", "invert"), [("removed", False), ("isolated", True)])
def test_a_split_that_does_not_isolate_its_matches_is_refused(behavior: str, invert: bool) -> None:
    split = next(split for split, name in SPLITS.items() if name == "qwen2")
    tokenizer = byte_level(split)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(QatkitError, match="is known to split text as this tokenizer does"):
        check_tokenizer(tokenizer)


REPLACE = normalizers.Replace(" ", "\u2581")
LLAMA2 = normalizers.Sequence([normalizers.Prepend("\u2581"), REPLACE])
GEMMA = pre_tokenizers.Split(" ", "merged_with_previous")


@pytest.mark.parametrize(
    ("normalizer", "split", "prefixed"), [(LLAMA2, None, True), (REPLACE, None, False), (REPLACE, GEMMA, False)]
)
def test_spaces_are_replaced_as_in_llama_2_and_gemma(normalizer: Any, split: Any, prefixed: bool) -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer = normalizer, split
    assert tokenizer_metadata(tokenizer, None)["tokenizer.ggml.add_space_prefix"] is prefixed


@pytest.mark.parametrize(
    ("normalizer", "split"),
    [
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), pre_tokenizers.Metaspace(split=False)),
        (normalizers.Sequence([normalizers.NFKC(), REPLACE]), None),
        (normalizers.Replace("a", "b"), None),
        (None, pre_tokenizers.Metaspace(split=True)),
        (None, pre_tokenizers.Metaspace("_", split=False)),
        (LLAMA2, pre_tokenizers.Digits()),
        (None, None),
    ],
)
def test_other_changes_of_text_before_sentencepiece_are_refused(normalizer: Any, split: Any) -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer = normalizer, split
    with pytest.raises(QatkitError, match="normalizes text only by replacing spaces"):
        check_tokenizer(tokenizer)


def test_of_several_chat_templates_the_default_is_stored() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"tools": "a", "default": TEMPLATE}
    assert tokenizer_metadata(tokenizer, None)["tokenizer.chat_template"] == TEMPLATE
    tokenizer.chat_template = {"tools": "a", "search": "b"}
    with pytest.raises(QatkitError, match="the chat templates search, tools, but none is the default"):
        check_tokenizer(tokenizer)
