"""Text as windows of tokens: tokenized once, kept in the user's cache, packed without padding."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qatkit.data.datamodule import SplitDataModule
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "val", "test")
END_OF_TEXT = "<|endoftext|>"
"""Stands after every document; its id is 0."""


class Windows(Dataset[dict[str, Tensor]]):
    """A stream of tokens, cut into windows: ``{"input_ids": [context], "labels": [context]}``, both int64.

    Labels are the inputs: a causal language model is trained to give each one from those before it, and the loss does
    the shift. What is left over at the end of the stream is dropped.

    Args:
        open_tokens: Gives the stream, ``[tokens]``; called when the first window is read.
        context: Tokens of a window, at least 2.

    Raises:
        QatkitError: `context` is below 2, or the stream is shorter than one window.
    """

    def __init__(self, open_tokens: Callable[[], NDArray[Any]], context: int) -> None:
        if context < 2:
            raise QatkitError(f"context: {context} leaves no token to predict; write 2 or more")
        self.open_tokens = open_tokens
        self.context = context

    @cached_property
    def _windows(self) -> NDArray[Any]:
        tokens = self.open_tokens()
        count = len(tokens) // self.context
        if count == 0:
            raise QatkitError(f"context: {self.context} is longer than a split of {len(tokens)} tokens; write less")
        return tokens[: count * self.context].reshape(count, self.context)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = torch.from_numpy(self._windows[index].astype(np.int64))
        return {"input_ids": window, "labels": window}

    def tensor(self) -> Tensor:
        """All windows at once, ``[windows, context]``, int64."""
        return torch.from_numpy(self._windows.astype(np.int64))


class TextDataModule(SplitDataModule):
    """Windows of tokens from a folder that holds a stream per split and the tokenizer.

    Args:
        folder: Gives the folder, and makes it where it does not exist yet; `stdlib_tokens` for example.
        context: Tokens of a window.
        batch_size: Windows per device and step.
        seed: Decides the training order.
        epoch_batches: Batches between two validations and checkpoints.
        load: Gives the tokenizer, where the folder holds none.

    Raises:
        QatkitError: `context` or `epoch_batches` is out of range.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        context: int,
        batch_size: int = 64,
        seed: int = 0,
        epoch_batches: int = 100,
        load: Callable[[], PreTrainedTokenizerFast] | None = None,
    ) -> None:
        if epoch_batches < 1:
            raise QatkitError(f"epoch_batches: {epoch_batches} is out of range; write a whole number of at least 1")
        train, val, test = (Windows(partial(_open_split, folder, split), context) for split in SPLITS)
        super().__init__(train, val, test, batch_size, seed, epoch_batches, task="causal")
        self.folder = folder
        self._load = load

    def prepare_data(self) -> None:
        self.folder()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """What the text was tokenized with, to be saved beside the model."""
        if self._load is not None:
            return self._load()
        from transformers import PreTrainedTokenizerFast

        file = str(self.folder() / "tokenizer.json")
        return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END_OF_TEXT)  # type: ignore[no-untyped-call]


def _open_split(folder: Callable[[], Path], split: str) -> NDArray[Any]:
    tokens: NDArray[Any] = np.load(folder() / f"{split}.npy", mmap_mode="r")
    return tokens


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text comes back from its tokens unchanged.

    Sennrich et al. (2016), "Neural Machine Translation of Rare Words with Subword Units", over bytes as in GPT-2.

    Args:
        documents: What to learn it from.
        vocab_size: Tokens at most: the end of text, 256 bytes, and merges; 257 to 65536.

    Raises:
        QatkitError: `vocab_size` is out of range.
    """
    if not 257 <= vocab_size <= 65536:
        raise QatkitError(f"vocab_size: {vocab_size} is out of range; write a number from 257 to 65536")
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
    """All documents as one stream of tokens, an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    parts = [np.asarray([*document.ids, end], dtype=np.uint16) for document in encoded]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


def cached_folder(key: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of the user's cache that belongs to a key, written first where it does not exist.

    It is written under another name and renamed, so that it is whole or not there; of two processes that write it at
    once, one wins and both read the same.

    Args:
        key: All that decides the content; plain data.
        write: Fills an empty folder.

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
            f"{home}: tokens cannot be kept there ({error}); set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    try:
        write(temporary)
        (temporary / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # another process was faster: its folder has the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
