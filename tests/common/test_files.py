"""Files are replaced as a whole: a process that dies in between leaves the old content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qatkit.common.files import atomic_path, remove_temporary, replaced_folder, temporary_path, write_atomically


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_write_that_is_cut_off_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, "né\nw")
    assert path.read_bytes() == "né\nw".encode()


def test_the_content_is_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("fsync")
        fsync(descriptor)

    def replaced(*paths: Any) -> None:
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "file", "content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        half()
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["model.onnx", ".hidden", "x.tmp", ".model.tmp", "wandb/.run.1.tmp", "stages/dense/last.ckpt"]
    left = [".recipe.yaml.17.tmp", "stages/dense/.last.ckpt.99999.tmp", "export/qat/.model.5.tmp/model.safetensors"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    removed = {str(path.relative_to(tmp_path)) for path in remove_temporary(tmp_path, exclude=["wandb"])}
    assert removed == {left[0], left[1], "export/qat/.model.5.tmp"}
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("folder", [False, True], ids=["a file", "a folder"])
def test_what_a_killed_writer_leaves_is_found(folder: bool, tmp_path: Path) -> None:
    temporary = temporary_path(tmp_path / "model")
    if folder:
        (temporary / "part").mkdir(parents=True)
    else:
        temporary.touch()
    assert remove_temporary(tmp_path) == [temporary]
    assert not list(tmp_path.iterdir())


def test_a_folder_gets_its_name_back_if_the_new_one_cannot_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == folder and not self.name.startswith(".model.replaced"):
            raise PermissionError(13, "not permitted", str(target))
        return rename(self, target)

    def replace() -> None:
        with replaced_folder(folder) as temporary:
            (temporary / "file").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(PermissionError):
            replace()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "file").read_text() == "old"
    replace()
    assert (folder / "file").read_text() == "new"


def test_a_link_keeps_pointing_to_the_folder_that_is_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "elsewhere" / "model", tmp_path / "link"
    folder.mkdir(parents=True)
    (folder / "file").write_text("old")
    link.symlink_to(folder)
    with replaced_folder(link) as temporary:
        (temporary / "file").write_text("new")
    assert link.is_symlink()
    assert (folder / "file").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
