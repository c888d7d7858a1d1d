"""Damaged files of a run and hostile input end in one message that names the place: no command has a traceback."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qatkit.run.checkpoint import save_checkpoint
from qatkit.run.record import Started, read_record, write_started
from tests.cli.conftest import RECIPE
from tests.cli.in_process import Done, qatkit

RUN = ("run", "recipe.yaml", "--out", "run")
READ_BY = {
    "recipe.yaml": ("report", "run"),
    "stages/dense/stage.json": RUN,
    "stages/qat/stage.json": ("verify", "run"),
    "stages/dense/model/model.safetensors": RUN,
    "stages/qat/quantizers.safetensors": ("export", "run"),
    "stages/dense/logs/attempt_0/metrics.csv": ("report", "run"),
    "export/qat/dense/verification.json": ("report", "run"),
    "export/dense/dense/model.safetensors": ("report", "run"),
    "teachers/qat/cache.json": ("cache-teacher", *RUN[1:]),
    "teachers/qat/000000.arrow": ("cache-teacher", *RUN[1:]),
}
CONTENTS = [b"", b"null", b"[[[]]]", b"[" * 9999, b"\xff\0\n"]


def refused(done: Done) -> str:
    """The message of a command that ended with one line for the user."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert "bug in qatkit" not in done.err
    assert done.err.startswith("error: ")
    return done.err


@pytest.mark.parametrize("name", READ_BY)
def test_a_damaged_file_of_a_run_is_named_by_the_command_that_reads_it(name: str, copied: Path) -> None:
    path = copied / "run" / name
    whole = path.read_bytes()
    for content in [whole[: len(whole) // 2], *CONTENTS]:
        if path.suffix == ".csv" and content != CONTENTS[-1]:
            continue  # a process that was killed may have left it
        path.write_bytes(content)
        assert path.name in refused(qatkit(*READ_BY[name], "--allow", "tests", cwd=copied))


def test_the_page_of_several_runs_refuses_a_damaged_report(copied: Path) -> None:
    path = copied / "run" / "report.json"
    content = json.loads(path.read_text())
    for key in content:
        path.write_text(json.dumps(content | {key: [None]}))
        assert "run/report.json" in refused(qatkit("report", "run", "../finished", cwd=copied))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if a disk were full after some bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "command", "name"),
    [
        (100, RUN, "run/recipe.yaml"),
        (3000, ("export", "run"), "export/dense/dense/model.safetensors"),
        (3000, ("run", "recipe.yaml", "stages.qat.lr=1e-2", "--force", "--out", "run"), "stages/qat/last.ckpt"),
    ],
)
def test_a_write_that_fails_names_its_file(size: int, command: tuple[str, ...], name: str, copied: Path) -> None:
    with largest_file(size):
        done = qatkit(*command, "--allow", "tests", cwd=copied)
    assert f"{name}: " in refused(done)
    assert "check the path, its permissions and the free disk space" in done.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[16]", "[" * 90 + "16" + "]" * 90, r"blocks are nested more than 40 levels deep; reduce the nesting"),
        ("[16]", "{a: " * 90 + "16" + "}" * 90, "nested more than 40 levels"),
        ("finished", '"\\ud800"', "name: the character U+D800 is not text"),
        ("{top_k: 3}", '{top_k: 3, folder: "a\\0"}', "distill.cache.folder: the character U+0000 is not text"),
    ],
)
def test_a_hostile_recipe_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new))
    assert message in refused(qatkit("validate", "recipe.yaml", "--allow", "tests", cwd=tmp_path))


@pytest.mark.parametrize("command", [RUN[:-1], ("report",), ("verify",), ("export",)])
def test_a_folder_whose_name_is_not_text_is_refused(command: tuple[str, ...], finished: Path) -> None:
    assert r"'a\xff' is not valid UTF-8" in refused(qatkit(*command, "a\udcff", "--allow", "tests", cwd=finished))


@pytest.mark.parametrize("name", ["started.json", "last.ckpt.json"])
def test_a_damaged_record_of_an_unfinished_stage_is_named_and_force_trains_it_again(name: str, copied: Path) -> None:
    folder = copied / "run" / "stages" / "dense"
    record = read_record(folder)
    assert record is not None
    write_started(folder, Started(record.inputs, record.fingerprint))
    save_checkpoint({"step": 1}, folder / "last.ckpt")
    (folder / "stage.json").unlink()
    (folder / name).write_text("{")
    command = ("run", "recipe.yaml", "--until", "dense", "--out", "run", "--allow", "tests", "--quiet")
    assert f"{name} is corrupt" in refused(qatkit(*command, cwd=copied))
    assert qatkit(*command, "--force", cwd=copied) == (0, "", "")
