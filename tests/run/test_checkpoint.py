"""Checkpoints: whole whenever a process dies, verified before they are read, and with the one before them kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit import QatkitError, QatkitWarning
from qatkit.run import checkpoint
from qatkit.run.checkpoint import delete_checkpoints, find_checkpoint, load_checkpoint, save_checkpoint


class Killed(BaseException):
    """Stands for SIGKILL."""


def save(folder: Path, step: int) -> None:
    save_checkpoint({"step": step, "state_dict": {"weight": torch.full([100], float(step))}}, folder / "last.ckpt")


def step_in(folder: Path) -> int:
    found = find_checkpoint(folder)
    assert found is not None
    return int(torch.load(found, weights_only=True)["step"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # the file before may be the same one under another name
    path.write_bytes(content)


def test_the_newest_is_found_and_the_one_before_it_is_kept(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
        assert step_in(tmp_path) == step
    assert torch.load(tmp_path / "previous.ckpt", weights_only=True)["step"] == 2
    delete_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_one_is_replaced_by_the_one_before_with_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "last.ckpt")
    with pytest.warns(QatkitWarning, match=r"last\.ckpt is corrupt; resuming from .*previous\.ckpt"):
        assert step_in(tmp_path) == 1


def test_without_a_whole_one_the_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(tmp_path / "last.ckpt")
    with pytest.raises(QatkitError, match=r"last\.ckpt or last\.ckpt\.json is corrupt .*; delete .* or use --force"):
        find_checkpoint(tmp_path)
    save_checkpoint({"state_dict": {}}, tmp_path / "best.ckpt")
    assert load_checkpoint(tmp_path / "best.ckpt") == {"state_dict": {}}
    (tmp_path / "best.ckpt").write_bytes((tmp_path / "best.ckpt").read_bytes()[:-10])
    with pytest.raises(QatkitError, match=r"best\.ckpt or best\.ckpt\.json is corrupt"):
        load_checkpoint(tmp_path / "best.ckpt")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("operation", ["replace", "link", "fsync"])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_at_any_file_operation_leaves_the_old_one_or_the_new(
    operation: str, call: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, 1)
    save(tmp_path, 2)
    real, calls = getattr(os, operation), iter(range(1, 100))

    def die(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, operation, die)
        try:
            save(tmp_path, 3)
        except Killed:
            assert step_in(tmp_path) in (2, 3)
        else:
            assert step_in(tmp_path) == 3
    save(tmp_path, 4)
    save(tmp_path, 5)
    assert step_in(tmp_path) == 5
    flip(tmp_path / "last.ckpt")
    with pytest.warns(QatkitWarning):
        assert step_in(tmp_path) == 4
