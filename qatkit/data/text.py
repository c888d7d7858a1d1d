"""Tokenize text once into the user's cache, and split it into windows without padding."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.common.files import naming
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
"""The token after each document; its ID is 0."""


class Windows(Dataset[dict[str, Tensor]]):
    """A token stream in windows: ``{"input_ids": [context], "labels": [context]}``, both int64.

    Labels equal the inputs; the loss of a causal language model shifts them. Tokens at the end of the stream that do
    not fill a window are dropped.

    Args:
        open_tokens: Function that opens the stream, ``[tokens]``; called when the first window is read.
        context: Window length in tokens, at least 2.

    Raises:
        QatkitError: `context` is below 2, or the stream is shorter than one window.
    """

    def __init__(self, open_tokens: Callable[[], NDArray[Any]], context: int) -> None:
        if context < 2:
            raise QatkitError(f"{context} leaves no token to predict", key="context", advice="use 2 or more")
        self.open_tokens = open_tokens
        self.context = context

    @cached_property
    def _windows(self) -> NDArray[Any]:
        tokens = self.open_tokens()
        count = len(tokens) // self.context
        if count == 0:
            raise QatkitError(
                f"{self.context} exceeds the {len(tokens)} tokens of a split",
                key="context",
                advice="use a smaller context, or more text",
            )
        return tokens[: count * self.context].reshape(count, self.context)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = torch.from_numpy(self._windows[index].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def tensor(self) -> Tensor:
        """Return all windows, ``[windows, context]``, int64."""
        return torch.from_numpy(self._windows.astype(np.int64))


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which is lossless for any text.

    Reference: Sennrich et al. (2016), "Neural Machine Translation of Rare Words with Subword Units"; applied to bytes
        as in GPT-2.

    Args:
        documents: The training text.
        vocab_size: Maximum vocabulary size, 257 to 65536: the end-of-text token, 256 bytes and the merges.

    Raises:
        QatkitError: `vocab_size` is out of range.
    """
    if not 257 <= vocab_size <= 65536:
        raise QatkitError(f"{vocab_size} is out of range", key="vocab_size", advice="use an integer from 257 to 65536")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: Iterable[str]) -> NDArray[np.uint16]:
    """Tokenize documents into one stream, with an end-of-text token after each document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    parts = [np.asarray([*document.ids, end], dtype=np.uint16) for document in encoded]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


def cached_folder(key: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Return the folder for a key in the user's cache; create it if it does not exist.

    It is written under a temporary name and renamed, so it is either complete or absent. If two processes write it at
    the same time, one wins, and both read the same content.

    Args:
        key: Everything that determines the content, as plain data.
        write: Writes the content into an empty folder.

    Raises:
        QatkitError: the cache cannot be written.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qatkit"
    folder = home / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if folder.exists():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
    except OSError as error:
        raise QatkitError(
            f"tokens cannot be cached in this folder ({error})",
            key=str(home),
            advice="set XDG_CACHE_HOME to a writable folder",
        ) from error
    try:
        with naming(home):
            write(temporary)
            (temporary / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # another process was faster; its folder has the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
