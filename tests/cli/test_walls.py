"""Nothing is written or deleted outside the run's folder without --allow-write, by any command and with --force."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.in_process import qatkit

COMMANDS = {
    "run": ("run", "recipe.yaml", "--out", "run"),
    "run --force": ("run", "recipe.yaml", "stages.dense.max_steps=6", "--force", "--out", "run"),
    "cache-teacher": ("cache-teacher", "recipe.yaml", "--out", "run"),
    "sensitivity": ("sensitivity", "recipe.yaml", "--batches", "1", "--out", "run"),
    "export": ("export", "run"),
    "verify": ("verify", "run"),
    "report": ("report", "run"),
}
LINKED = [
    "stages/qat",
    "export",
    "teachers/qat",
    "report.html",
    "stages/dense/logs",
    "wandb",
    "stages/dense/stage.json",
]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def moved_out(folder: Path, name: str) -> Path:
    """Put a part of the run elsewhere, with a link to it in its place."""
    path, other = folder / "run" / name, folder.parent / "foreign" / Path(name).name
    other.parent.mkdir()
    if path.exists():
        shutil.move(path, other)
    else:
        other.mkdir()
    path.symlink_to(other)
    return other


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_follows_a_link_out_of_the_run(command: str, copied: Path) -> None:
    other = moved_out(copied, "stages/qat")
    before = content_of(copied.parent)
    done = qatkit(*COMMANDS[command], "--allow", "tests", cwd=copied)
    assert done.code == 2
    assert f"error: run/stages/qat: this link leads to {other}, outside run; remove the link, or pass" in done.err
    assert content_of(copied.parent) == before


@pytest.mark.parametrize("name", LINKED)
def test_a_link_anywhere_in_the_run_is_refused_and_allowed_by_name(name: str, copied: Path) -> None:
    other = moved_out(copied, name)
    before = content_of(copied.parent)
    assert qatkit(*COMMANDS["report"], "--allow", "tests", cwd=copied).code == 2
    assert content_of(copied.parent) == before
    allowed = qatkit(*COMMANDS["verify"], "--allow", "tests", "--allow-write", str(other), cwd=copied)
    assert allowed.code == 0, allowed.err


@pytest.mark.parametrize("folder", ["../cache", "{tmp}/cache", "run/../cache"])
def test_a_recipe_writes_its_cache_outside_the_run_only_if_that_is_allowed(folder: str, copied: Path) -> None:
    override = f"stages.qat.distill.cache.folder={folder.format(tmp=copied.parent)}"
    target = (copied / override.partition("=")[2]).resolve()
    arguments = (*COMMANDS["cache-teacher"], override, "--allow", "tests")
    before = content_of(copied.parent)
    for command in (arguments, ("run", *arguments[1:])):
        done = qatkit(*command, cwd=copied)
        assert done.code == 2
        assert "stages.qat.distill.cache.folder: '" in done.err
        assert "would be written outside the run folder run; remove the key, or pass --allow-write" in done.err
    assert content_of(copied.parent) == before
    assert "--allow-write" in qatkit("validate", "recipe.yaml", override, "--allow", "tests", cwd=copied).out
    allowed = qatkit(*arguments, "--allow-write", str(target), cwd=copied)
    assert allowed.code == 0, allowed.err
    assert (target / "cache.json").is_file()


def test_a_cache_in_a_folder_of_the_run_needs_no_option(copied: Path) -> None:
    override = "stages.qat.distill.cache.folder=run/teachers/mine"
    done = qatkit(*COMMANDS["cache-teacher"], override, "--allow", "tests", cwd=copied)
    assert done.code == 0, done.err
    assert (copied / "run" / "teachers" / "mine" / "cache.json").is_file()
