"""The tokenizer in a GGUF file: vocabulary, merges, special tokens and chat template as metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qatkit.common.tables import Table
from qatkit.errors import QatkitError

Content = dict[str, Any]
"""The content of a ``tokenizer.json``."""

_ADVICE = "use export: {format: dense}, which saves tokenizer.json, or use another tokenizer"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "": "gpt-2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_UPPER}|{_LOWER}|\p{{N}}|{_REST_SLASH}": "tekken",
    rf"{_UPPER}{_CONTRACTIONS}?|{_LOWER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}": "gpt-4o",
}
"""llama.cpp's names of pre-tokenizers, by the regular expression that splits the text; "" stands for GPT-2's."""

_PREPEND = {"type": "Prepend", "prepend": "\u2581"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "", "split": False}
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's pre-tokenizer, which never finds a space, because the normalizer has replaced all of them."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of tokens in GGUF."""


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer that llama.cpp implements."""

    name: str
    """The name in GGUF."""
    recognizes: Callable[[Content], bool]
    describe: Callable[[Content, list[str]], dict[str, Any]]
    """``(content, tokens)``: the metadata of this kind, without the prefix."""
    spell: Callable[[str], str] = str
    """The spelling of a token in GGUF."""


def _parts(part: Content | None) -> list[Content]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    steps: list[Content] = part.get("normalizers") or part.get("pretokenizers") or [part]
    return steps


def _steps(content: Content, part: str) -> list[str]:
    return [step["type"] for step in _parts(content.get(part))]


def _merges(content: Content) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]


def _byte_level(content: Content, tokens: list[str]) -> dict[str, Any]:
    if unknown := [step for step in _steps(content, "normalizer") if step != "NFC"]:  # llama.cpp leaves NFC out
        raise QatkitError(f"llama.cpp does not support the tokenizer's normalizer {unknown[0]}", advice=_ADVICE)
    steps = _parts(content["pre_tokenizer"])
    split = "|".join(step["pattern"].get("Regex", "?") for step in steps if step["type"] == "Split")
    last = steps[-1]
    kinds = [step["type"] for step in steps]
    known = kinds in (["ByteLevel"], ["Split", "ByteLevel"]) and last["use_regex"] == (not split)
    known &= all((step["behavior"], step["invert"]) == ("Isolated", False) for step in steps[:-1])
    if not known or split not in SPLITS or last["add_prefix_space"]:
        raise QatkitError(
            f"no pre-tokenizer of llama.cpp is known to split text as this tokenizer does ({' and '.join(kinds)}: "
            f"{split!r})",
            advice=_ADVICE,
        )
    if not (merges := _merges(content)):
        raise QatkitError("the tokenizer has no merges, and a GGUF file cannot store an empty list", advice=_ADVICE)
    return {"pre": SPLITS[split], "merges": merges}


def _sentencepiece(content: Content, tokens: list[str]) -> dict[str, Any]:
    """llama.cpp joins the pair whose result has the highest score, and tokenizers the pair of the earliest merge."""
    normalizers, splits = (_parts(content.get(part)) for part in ("normalizer", "pre_tokenizer"))
    if normalizers:
        known = normalizers in ([_PREPEND, _REPLACE], [_REPLACE]) and splits in ([], [_NO_SPLIT])
    else:
        known = [step | {"prepend_scheme": ""} for step in splits] == [_METASPACE]
    if not known:
        kinds = [step["type"] for step in (*normalizers, *splits)]
        raise QatkitError(
            "with byte fallback, llama.cpp normalizes text only by replacing spaces, but this tokenizer has "
            f"{' and '.join(kinds) or 'no normalizer'} with other settings",
            advice=_ADVICE,
        )
    rank: dict[str, int] = {}
    for index, merge in enumerate(content["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, index)
    prefixed = _PREPEND in normalizers or any(step.get("prepend_scheme") in ("always", "first") for step in splits)
    last = len(content["model"]["merges"])  # tokens that no merge makes
    return {"scores": [float(-rank.get(token, last)) for token in tokens], "add_space_prefix": prefixed}


def _wordpiece(content: Content, tokens: list[str]) -> dict[str, Any]:
    if not (content.get("normalizer") or {}).get("lowercase"):
        raise QatkitError("llama.cpp converts text for BERT to lower case, but the tokenizer does not", advice=_ADVICE)
    return {"token_type_count": 2}


def _wordpiece_token(token: str) -> str:
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else f"\u2581{token}"


TOKENIZER_KINDS = Table(
    "tokenizer",
    [
        TokenizerKind(
            "gpt2",
            lambda content: content["model"]["type"] == "BPE" and "ByteLevel" in _steps(content, "pre_tokenizer"),
            _byte_level,
        ),
        TokenizerKind(
            "llama",
            lambda content: content["model"]["type"] == "BPE" and bool(content["model"].get("byte_fallback")),
            _sentencepiece,
        ),
        TokenizerKind(
            "bert", lambda content: content["model"]["type"] == "WordPiece", _wordpiece, spell=_wordpiece_token
        ),
    ],
)
"""Every supported tokenizer by its name in GGUF."""

_SPECIAL = {
    "bos_token_id": ("bos", "cls"),
    "eos_token_id": ("eos", "sep"),
    "unknown_token_id": ("unk",),
    "seperator_token_id": ("sep",),  # codespell: the spelling of GGUF
    "padding_token_id": ("pad",),
    "mask_token_id": ("mask",),
}
"""Metadata keys of special tokens. Each has a list of tokenizer attributes; the first one that is set is used."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise an error if llama.cpp does not support a tokenizer.

    Args:
        tokenizer: The tokenizer of the data, or None.

    Raises:
        QatkitError: the kind of tokenizer, its normalizer or its pre-tokenizer is not supported.
    """
    if tokenizer is not None:
        tokenizer_metadata(tokenizer, None)


def tokenizer_metadata(tokenizer: Any, vocab_size: int | None) -> dict[str, Any]:
    """Return the metadata of a tokenizer by key; without a tokenizer, the metadata says so.

    Args:
        tokenizer: A fast tokenizer of transformers, or None.
        vocab_size: The number of embeddings; those without a token get an unused token. None if it is unknown.

    Raises:
        QatkitError: llama.cpp does not support the tokenizer, or it has more tokens than the model.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise QatkitError(f"{type(tokenizer).__name__} is not a fast tokenizer", advice=_ADVICE)
    content = json.loads(backend.to_str())
    kind = next((row for row in TOKENIZER_KINDS.values() if row.recognizes(content)), None)
    if kind is None:
        model = content["model"]["type"]
        raise QatkitError(f"llama.cpp does not support the tokenizer's model {model} in a GGUF file", advice=_ADVICE)
    tokens, types = _tokens(content, vocab_size)
    ids = backend.encode("a").ids
    special = {
        key: next(
            (found for name in names if (found := getattr(tokenizer, f"{name}_token_id", None)) is not None), None
        )
        for key, names in _SPECIAL.items()
    }
    values = {
        "model": kind.name,
        **kind.describe(content, tokens),
        "tokens": [kind.spell(token) for token in tokens],
        "token_type": types,
        **{key: value for key, value in special.items() if value is not None},
        "add_bos_token": ids[0] == special["bos_token_id"],
        "add_eos_token": ids[-1] == special["eos_token_id"],
    }
    template = _chat_template(tokenizer)
    written = {} if template is None else {"tokenizer.chat_template": template}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | written


def _chat_template(tokenizer: Any) -> str | None:
    """The chat template; of several, the default."""
    template: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise QatkitError(
            f"the tokenizer has the chat templates {', '.join(sorted(template)) or '(none)'}, but none is the default",
            advice="set tokenizer.chat_template to one template",
        )
    return template["default"]


def _tokens(content: Content, vocab_size: int | None) -> tuple[list[str], list[int]]:
    """The tokens in the order of their IDs, and their types."""
    vocabulary = {index: token for token, index in content["model"]["vocab"].items()}
    unknown = content["model"].get("unk_token")
    types = {
        index: _BYTE if _is_byte(token, content) else _UNKNOWN if token == unknown else _NORMAL
        for index, token in vocabulary.items()
    }
    for added in content["added_tokens"]:
        vocabulary[added["id"]] = added["content"]
        known = types.get(added["id"])
        types[added["id"]] = known if known in (_UNKNOWN, _BYTE) else _CONTROL if added["special"] else _USER_DEFINED
    size = max(vocabulary, default=-1) + 1
    if vocab_size is not None and size > vocab_size:
        raise QatkitError(
            f"the tokenizer has {size} tokens, but the model has {vocab_size} embeddings",
            advice="use the model's own tokenizer",
        )
    indices = range(vocab_size or size)
    return [vocabulary.get(index, f"[PAD{index}]") for index in indices], [types.get(i, _UNUSED) for i in indices]


def _is_byte(token: str, content: Content) -> bool:
    named = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return named and bool(content["model"].get("byte_fallback"))
