"""A text corpus without a download: the standard library of the running Python interpreter."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qatkit.data.columns import documents_of
from qatkit.data.source import check_fractions
from qatkit.data.text import SPLITS, Windows, cached_folder, tokenize, train_tokenizer
from qatkit.data.tokenizers import end_of_text, fingerprint, load_tokenizer
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.data.text_datamodule import TextDataModule

# not part of the library (site-packages), not on every machine (tests, idlelib), or generated: tables of encodings are
# near copies of each other, so held-out ones would be memorized
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def stdlib_text(
    context: int = 128,
    vocab_size: int = 2048,
    include: Sequence[str] = ("*",),
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    epoch_batches: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    tokenizer: str | None = None,
) -> TextDataModule:
    """Tokenize the source code of Python's standard library into windows: about 8 MB of text, without a download.

    Whole files are held out for validation and test by a hash of their names, so the splits are the same on machines
    with the same Python version. A byte-level BPE tokenizer is trained on the training files unless `tokenizer` is set;
    in a recipe, a pretrained model provides its own. Tokens are cached in ``$XDG_CACHE_HOME/qatkit`` or
    ``~/.cache/qatkit``.

    Args:
        context: Window length in tokens, at least 2.
        vocab_size: Maximum vocabulary size of the trained tokenizer, 257 to 65536.
        include: Globs over file names, such as ``json/*``; each must match a file.
        val_fraction: Fraction of files that is held out for validation.
        test_fraction: Fraction of files that is held out for the reported metrics.
        epoch_batches: Batches between validations (and checkpoints); fewer if the text is shorter.
        batch_size: Windows per device per step.
        seed: Determines the training order.
        tokenizer: A tokenizer folder, or the name of a model on the hub; None trains one.

    Raises:
        QatkitError: an argument is out of range, a glob matches no file, a split would have no files, or the tokenizer
            cannot be loaded or has no end-of-text token.

    Example:
        >>> data = stdlib_text(context=32, vocab_size=512, include=["email/*"], val_fraction=0.2, test_fraction=0.2)
        >>> next(iter(data.train_dataloader()))["input_ids"].shape
        torch.Size([64, 32])
    """
    from qatkit.data.text_datamodule import TextDataModule

    folder = partial(stdlib_tokens, vocab_size, tuple(include), val_fraction, test_fraction, tokenizer)
    load = None if tokenizer is None else partial(load_tokenizer, tokenizer)
    return TextDataModule(folder, context, batch_size, seed, epoch_batches, load)


stdlib_text.task = "causal"  # type: ignore[attr-defined]  # read by `qatkit.tasks.declared_task`


def text_windows(context: int = 128, vocab_size: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """Return training, validation and test windows of the standard library, each ``[N, context]`` int64.

    Example:
        >>> # tokenizes 8 MB on first use
        >>> train, val, test = text_windows(context=64)  # doctest: +SKIP
    """
    folder = stdlib_tokens(vocab_size)

    train, val, test = (Windows(partial(np.load, folder / f"{split}.npy"), context).tensor() for split in SPLITS)
    return train, val, test


def stdlib_tokens(
    vocab_size: int = 2048,
    include: Sequence[str] = ("*",),
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    tokenizer: str | None = None,
) -> Path:
    """Return the cache folder with ``train.npy``, ``val.npy`` and ``test.npy``; create it if needed.

    It also contains ``tokenizer.json`` if this function trains the tokenizer.

    Raises:
        QatkitError: for the same reasons as in `stdlib_text`.
    """
    splits = split_files(stdlib_files(include=include), val_fraction, test_fraction)
    documents = {split: [path.read_bytes() for path in files.values()] for split, files in splits.items()}
    corpus = [
        [name, _sha256(text)] for split in SPLITS for name, text in zip(splits[split], documents[split], strict=True)
    ]
    key: dict[str, Any] = {
        "corpus": _sha256(json.dumps([[len(splits[split]) for split in SPLITS], corpus]).encode()),
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
    }
    key |= {"vocab_size": vocab_size} if tokenizer is None else {"tokenizer": fingerprint(load_tokenizer(tokenizer))}

    def write(folder: Path) -> None:
        texts = {split: [text.decode(errors="replace") for text in documents[split]] for split in SPLITS}
        if tokenizer is not None:
            for split in SPLITS:
                np.save(folder / f"{split}.npy", tokenize_with(tokenizer, texts[split]))
            return
        learned = train_tokenizer(texts["train"], vocab_size)
        learned.save(str(folder / "tokenizer.json"))
        for split in SPLITS:
            np.save(folder / f"{split}.npy", tokenize(learned, texts[split]))

    return cached_folder(key, write)


def tokenize_with(tokenizer: str, documents: list[str]) -> NDArray[np.uint32]:
    """Tokenize documents with a pretrained tokenizer into one stream, with an end-of-text token after each document."""
    loaded = load_tokenizer(tokenizer)
    parts = documents_of(loaded, end_of_text(loaded, tokenizer), documents)
    return np.concatenate([np.asarray(part, dtype=np.uint32) for part in parts])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stdlib_files(root: Path | None = None, include: Sequence[str] = ("*",)) -> dict[str, Path]:
    """Return the library's own ``.py`` files by their names relative to its folder, sorted.

    Args:
        root: The library's folder. The default is the folder of the running interpreter.
        include: Globs over the names; each must match a file.

    Raises:
        QatkitError: a glob matches no file.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    kept = dict(sorted(_walk(root)))
    for pattern in include:
        if not any(fnmatch(name, pattern) for name in kept):
            raise QatkitError(
                f"'{pattern}' matches no file in the standard library",
                key="include",
                advice="use a glob such as '*' or 'json/*'",
            )
    return {name: path for name, path in kept.items() if any(fnmatch(name, pattern) for pattern in include)}


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    # excluded folders are not walked: site-packages may hold twenty times as many files as the library
    for place, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in _LEFT_OUT and not folder.startswith("config-")]
        folder = Path(place)
        below = folder.relative_to(root)
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                yield (below / file).as_posix(), folder / file


def split_files(files: dict[str, Path], val_fraction: float, test_fraction: float) -> dict[str, dict[str, Path]]:
    """Split files into training, validation and test by name only.

    Raises:
        QatkitError: a fraction is out of range, or a split would have no files.
    """
    check_fractions(val_fraction, test_fraction, example=0.05)
    splits: dict[str, dict[str, Path]] = {split: {} for split in SPLITS}
    for name, path in files.items():
        position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        split = "val" if position < val_fraction else "test" if position < val_fraction + test_fraction else "train"
        splits[split][name] = path
    empty = [split for split in SPLITS if not splits[split]]
    if empty:
        raise QatkitError(
            f"{len(files)} files leave none for {' and '.join(empty)}",
            key="include",
            advice="include more files, or use larger fractions",
        )
    return splits
