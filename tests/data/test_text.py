"""Text to windows: the tokenizer loses nothing, packing loses no token in between, the cache is whole or absent."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from qatkit import QatkitError
from qatkit.data.text import END_OF_TEXT, Windows, cached_folder, tokenize, train_tokenizer
from qatkit.data.text_datamodule import TextDataModule

DOCUMENTS = ["def f(x):\n\treturn x\r\n", "", "naïve € 漢字 \x00 " + END_OF_TEXT[:5], "def f(y):\n    return y\n"] * 3


def test_tokens_give_back_any_text_and_every_document_ends_with_the_end_of_text() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    stream = tokenize(tokenizer, DOCUMENTS)
    assert stream.dtype == np.uint16
    (ends,) = np.nonzero(stream == 0)
    parts = np.split(stream, ends + 1)[:-1]
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == DOCUMENTS
    assert tokenizer.id_to_token(0) == END_OF_TEXT


def test_a_tokenizer_learned_twice_is_the_same() -> None:
    assert train_tokenizer(DOCUMENTS, 320).to_str() == train_tokenizer(DOCUMENTS, 320).to_str()


@pytest.mark.parametrize("size", [256, 65537])
def test_a_vocabulary_that_bytes_or_uint16_cannot_hold_is_refused(size: int) -> None:
    with pytest.raises(QatkitError, match=f"vocab_size: {size} is out of range; use an integer from 257 to 65536"):
        train_tokenizer(DOCUMENTS, size)


def test_windows_follow_each_other_without_overlap_and_labels_are_the_inputs() -> None:
    windows = Windows(lambda: np.arange(23, dtype=np.uint16), 5)
    assert len(windows) == 4
    assert torch.cat([window["input_ids"] for window in windows]).tolist() == list(range(20))
    assert windows[2]["labels"].tolist() == windows[2]["input_ids"].tolist() == [10, 11, 12, 13, 14]
    assert windows[2]["input_ids"].dtype == torch.int64
    assert torch.equal(windows.tensor(), torch.arange(20).view(4, 5))


def test_windows_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"context: 1 leaves no token to predict; use 2 or more"):
        Windows(lambda: np.arange(9), 1)
    with pytest.raises(QatkitError, match=r"context: 10 exceeds the 9 tokens of a split"):
        len(Windows(lambda: np.arange(9), 10))


def folder_of(path: Path) -> Path:
    for split, count in (("train", 64), ("val", 12), ("test", 20)):
        np.save(path / f"{split}.npy", np.arange(count, dtype=np.uint16))
    train_tokenizer(DOCUMENTS, 300).save(str(path / "tokenizer.json"))
    return path


class Give:
    """A folder as a picklable callable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Path:
        return self.path


def test_the_order_of_training_depends_on_seed_and_epoch_and_evaluation_sees_all_in_order(tmp_path: Path) -> None:
    give = Give(folder_of(tmp_path))

    def order(seed: int, epoch: int) -> list[int]:
        loader = TextDataModule(give, context=4, batch_size=4, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # a DistributedSampler
        return [int(row[0]) for batch in loader for row in batch["input_ids"]]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == list(range(0, 64, 4))
    data = pickle.loads(pickle.dumps(TextDataModule(give, context=4, batch_size=2)))
    assert torch.cat([batch["labels"] for batch in data.val_dataloader()]).flatten().tolist() == list(range(12))
    assert torch.cat([batch["labels"] for batch in data.test_dataloader()]).flatten().tolist() == list(range(20))


def test_the_tokenizer_is_one_that_transformers_saves_and_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "saved").mkdir()
    tokenizer = TextDataModule(Give(folder_of(tmp_path)), context=4).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded("def f(x)")["input_ids"] == tokenizer("def f(x)")["input_ids"]
    assert loaded.decode(loaded("naïve €")["input_ids"]) == "naïve €"
    assert loaded.eos_token_id == 0


def test_a_cached_folder_is_written_once_and_only_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written: list[Path] = []

    def write(folder: Path) -> None:
        written.append(folder)
        (folder / "x").write_text("1")
        if len(written) == 1:
            raise KeyboardInterrupt  # killed in the middle

    with pytest.raises(KeyboardInterrupt):
        cached_folder({"a": 1}, write)
    assert os.listdir(tmp_path / "qatkit") == []
    found = cached_folder({"a": 1}, write)
    assert (found / "x").read_text() == "1"
    assert cached_folder({"a": 1}, write) == found
    assert cached_folder({"a": 2}, write) != found
    assert len(written) == 3


def test_of_two_processes_that_write_the_same_folder_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(folder: Path, depth: int = 0) -> None:
        (folder / "depth").write_text(str(depth))
        if depth == 0:
            cached_folder({}, lambda other: write(other, 1))  # the other process, from start to end

    assert (cached_folder({}, write) / "depth").read_text() == "1"
    assert len(os.listdir(tmp_path / "qatkit")) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(QatkitError, match=r"cannot be cached in this folder .*; set XDG_CACHE_HOME to a writable"):
        cached_folder({}, lambda folder: None)
