"""Links that leave a folder, and paths outside it, are refused by name; links that stay inside are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatkit import QatkitError
from qatkit.common.walls import check_links, check_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("kept")
    return tmp_path / "run"


@pytest.mark.parametrize("target", ["../other", "../other/file", "../absent", "/", "stages/../../other"])
def test_a_link_that_leaves_the_folder_is_refused_by_its_name(target: str, folder: Path) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(
        QatkitError, match=r"run/link: this link leads to /.*, outside .*run; remove the link, or pass --allow"
    ):
        check_links(folder)


def test_links_inside_and_an_allowed_target_are_accepted(folder: Path, tmp_path: Path) -> None:
    (folder / "latest").symlink_to("stages")
    (folder / "loop").symlink_to("loop")
    check_links(folder)
    (folder / "stages" / "dense").symlink_to(tmp_path / "other")
    check_links(folder, [tmp_path / "other"])
    (tmp_path / "other" / "deep").symlink_to("/")
    with pytest.raises(QatkitError, match="other/deep"):  # behind the allowed link
        check_links(folder, [tmp_path / "other"])


def test_the_folder_may_itself_be_a_link_or_be_absent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to("run")
    check_links(tmp_path / "name")
    check_links(tmp_path / "absent")


def test_a_link_to_the_log_of_wandb_is_accepted_and_a_link_to_a_folder_of_its_name_is_not(folder: Path) -> None:
    logs = folder / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/var/log/core-debug.log")
    check_links(folder)
    (logs / "debug-core.log").unlink()
    (logs / "debug-core.log").symlink_to("/")
    with pytest.raises(QatkitError, match=r"debug-core\.log: this link"):
        check_links(folder)


def test_a_path_must_be_in_the_folder_or_allowed(folder: Path, tmp_path: Path) -> None:
    check_path(folder / "teachers" / "shared", folder, [], "key")
    check_path(tmp_path / "cache" / "deep", folder, [tmp_path / "cache"], "key")
    for path in (tmp_path / "running", folder / ".." / "x", tmp_path):
        with pytest.raises(QatkitError, match=r"key: '.*' would be written outside .*; remove .* --allow-write"):
            check_path(path, folder, [], "key")
