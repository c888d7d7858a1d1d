"""A launched process does not outlive its launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qatkit.pipeline.processes import LAUNCHER, as_launcher

CHILD = """
import time
from qatkit.pipeline.processes import end_with_parent
end_with_parent(0.05)
print("watching", flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_when_its_launcher_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it is alive
    parent.kill()
    parent.wait()
    while exists(child):  # the timeout of the suite ends a test that hangs
        time.sleep(0.05)


def test_a_process_whose_launcher_was_killed_before_it_started_to_watch_ends() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    environment = os.environ | {LAUNCHER: str(launcher.pid)}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.wait() == 1


def test_only_processes_that_a_run_launches_learn_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    with as_launcher():
        assert os.environ[LAUNCHER] == str(os.getpid())
    assert LAUNCHER not in os.environ, "a later process of the user's would end with this one"


def exists(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # nobody may have waited for it yet
    except FileNotFoundError:
        return False
