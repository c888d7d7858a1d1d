"""One process writes into a run folder at a time; a lock that a dead process left behind holds nobody up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qatkit import QatkitError
from qatkit.cli.commands import COMMANDS
from qatkit.run import lock
from qatkit.run.lock import Holder, local_holder, lock_holder, locked
from tests.cli.in_process import qatkit

HOLD = """
import os, sys
from pathlib import Path
from qatkit.run.lock import locked
with locked(Path(sys.argv[1])):
    if "fork" not in sys.argv or not os.fork():  # the forked process says it, once it has closed its copy of the lock
        print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, *how: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until its standard input closes."""
    command = [sys.executable, "-c", HOLD, str(folder), *how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(folder: Path, **changes: object) -> None:
    """A lock that a killed process left behind."""
    holder = replace(Holder.this_process(), pid=2**22 + 1, **changes)  # type: ignore[arg-type]
    (folder / "run.lock").write_text(json.dumps(asdict(holder)))


def test_a_second_process_is_refused_by_host_and_id_and_enters_when_the_first_has_ended(tmp_path: Path) -> None:
    process = hold(tmp_path)
    refused = (
        rf"process {process.pid} on host {lock.socket.gethostname()} has used this folder since .*; wait until that "
        r"process ends, "
        rf"stop it with `kill {process.pid}`, or use another --out"
    )
    with pytest.raises(QatkitError, match=refused) as caught, locked(tmp_path):
        pass
    assert caught.value.key == str(tmp_path)
    assert local_holder(tmp_path) == process.pid, "the refused process left the name of the holder"
    process.communicate()
    assert not (tmp_path / "run.lock").exists()
    with locked(tmp_path):
        assert local_holder(tmp_path) == os.getpid()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "vision/digits_int8", "--out", "run"),
        ("cache-teacher", "llm/distill_layers", "stages.{stage}.distill.cache={{top_k: 4}}", "--out", "run"),
        ("export", "run"),
        ("verify", "run"),
        ("report", "run"),
        ("sensitivity", "vision/digits_int8", "--out", "run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_writes_into_a_run_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert arguments[0] in COMMANDS
    from qatkit.recipe.loading import load_recipe, recipe_to_yaml

    stage = next(name for name, stage in load_recipe("llm/distill_layers").stages.items() if stage.distill)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("vision/digits_int8")))
    process = hold(tmp_path / "run")
    done = qatkit(*(part.format(stage=stage) if "{stage}" in part else part for part in arguments), cwd=tmp_path)
    process.communicate()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: run: process {process.pid} on host ")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["recipe.yaml"]


def test_the_next_command_removes_what_a_killed_one_left_and_says_so(tmp_path: Path) -> None:
    from qatkit.recipe.loading import load_recipe, recipe_to_yaml

    run = tmp_path / "run"
    (run / "stages" / "dense").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe_to_yaml(load_recipe("vision/digits_int8")))
    (run / "stages" / "dense" / ".last.ckpt.17.tmp").touch()
    leave(run)
    done = qatkit("verify", "run", cwd=tmp_path)
    assert done.err.startswith("removed temporary files left by a killed process: stages/dense/.last.ckpt.17.tmp\n")
    assert done.code == 2, "nothing is exported yet"
    assert sorted(path.name for path in run.rglob("*")) == ["dense", "recipe.yaml", "stages"]


@pytest.mark.parametrize("how", [(), ("fork",)], ids=["alone", "while a forked process lives on"])
def test_the_lock_of_a_killed_process_is_taken_over(how: tuple[str, ...], tmp_path: Path) -> None:
    process = hold(tmp_path, *how)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert local_holder(tmp_path) == process.pid
    with locked(tmp_path):
        assert local_holder(tmp_path) == os.getpid()
        process.communicate()  # the forked process ends, and leaves the lock alone
        assert local_holder(tmp_path) == os.getpid()


def test_the_lock_of_a_dead_process_is_taken_over_although_another_one_has_its_id_now(tmp_path: Path) -> None:
    alive = hold(tmp_path / "other")
    holder = replace(Holder.this_process(), pid=alive.pid)
    (tmp_path / "run.lock").write_text(json.dumps(asdict(holder)))
    with locked(tmp_path):
        assert local_holder(tmp_path) == os.getpid()
    alive.communicate()


def test_a_lock_of_another_host_is_refused_with_the_file_to_delete(tmp_path: Path) -> None:
    leave(tmp_path, host="far", boot="other")
    with (
        pytest.raises(QatkitError, match=r"on host far has .* if it has already ended, delete .*run\.lock"),
        locked(tmp_path),
    ):
        pass
    (tmp_path / "run.lock").unlink()
    with locked(tmp_path):
        pass


def test_another_container_on_this_machine_sees_whether_the_process_lives(tmp_path: Path) -> None:
    if not Holder.this_process().boot:
        pytest.skip("the system does not identify itself")
    leave(tmp_path, host="container")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("state", ["dead", "alive", "recycled"])
def test_a_file_system_without_locks_leaves_the_decision_to_the_process_id(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_lock", lambda descriptor: None)
    process = hold(tmp_path / "other")
    other = lock_holder(tmp_path / "other")
    assert other is not None
    if state == "dead":
        process.communicate()
    holder = replace(other, started="1") if state == "recycled" else other
    (tmp_path / "run.lock").write_text(json.dumps(asdict(holder)))
    if state == "alive":
        with pytest.raises(QatkitError, match=rf"process {process.pid} on host"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert local_holder(tmp_path) == os.getpid()
    process.communicate()


def test_nested_uses_share_the_lock_and_folders_that_stay_empty_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with locked(out):
        with locked(out):
            pass
        assert local_holder(out) == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_a_damaged_lock_that_nobody_holds_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(content)
    with locked(tmp_path):
        assert local_holder(tmp_path) == os.getpid()


@pytest.mark.parametrize("content", ["", "[]", "[" * 9999, '{"pid": 1}', '"x"', "null"])
def test_a_lock_file_that_names_no_process_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(content)
    assert lock_holder(tmp_path) is None
    with locked(tmp_path):
        pass


def test_a_holder_with_an_odd_type_is_no_holder(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(json.dumps(asdict(Holder.this_process()) | {"pid": "1"}))
    assert lock_holder(tmp_path) is None
