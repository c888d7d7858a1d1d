"""SIGTERM ends a process with 143: at once, where its work is saved, or at a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from qatkit.common.termination import terminable, termination

START = """
import os, signal, subprocess, sys, time
from qatkit.common import termination as module
from qatkit.common.termination import Terminated, terminable, termination
def term(pid=None):
    os.kill(pid or os.getpid(), signal.SIGTERM)
def report(reason):
    print("report:", reason, flush=True)
def stuck():  # as a thread that waits for another process, or code that swallows every exception
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
module.END_LIMIT = module.STEP_LIMIT = 0.2
"""


def run(code: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", START + code], stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout.splitlines()


def test_the_main_thread_stops_at_once() -> None:
    code = """
with terminable(report):
    try:
        term()
        time.sleep(60)
    except Terminated:
        print("stopped", termination().received)
"""
    assert run(code) == (0, ["stopped True"])


def test_a_main_thread_that_defers_it_goes_on_until_it_checks() -> None:
    code = """
module.STEP_LIMIT = 60
with terminable(report):
    termination().defer(True)
    term()
    print("one more step", termination().received)
    termination().defer(False)
    try:
        termination().check()
    except Terminated:
        print("stopped")
"""
    assert run(code) == (0, ["one more step True", "stopped"])


@pytest.mark.parametrize(("deferred", "reason"), [(False, ""), (True, "no training step ended within 0.2 s")])
def test_a_main_thread_that_does_not_stop_is_ended_at_the_deadline(deferred: bool, reason: str) -> None:
    code = f"""
with terminable(report):
    termination().defer({deferred})
    term()
    stuck()
""" if deferred else """
with terminable(report):
    try:
        term()
    except Terminated:
        stuck()
"""  # fmt: skip
    assert run(code) == (143, [f"report: {reason}"])


def test_a_checkpoint_that_is_being_written_has_no_deadline() -> None:
    code = """
with terminable(report):
    termination().defer(True)
    term()
    with termination().saving():
        time.sleep(1)
    termination().saved = "written"
    stuck()
"""
    assert run(code) == (143, ["report: written"])


def test_started_processes_end_too_and_the_deadline_does_not_wait_for_them() -> None:
    code = """
ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE)
child.stdout.readline()
children = [child]
with terminable(report):
    termination().children.append(lambda: children)
    try:
        term()
        time.sleep(60)
    except Terminated:
        print("stopped")
print(child.returncode or child.wait(), children)
"""
    assert run(code) == (0, ["stopped", f"{-signal.SIGKILL} []"])


def test_a_process_that_follows_tells_the_leading_one_and_goes_on() -> None:
    code = """
module._LAG = 0.5
leader = subprocess.Popen([sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"], stdout=-1)
leader.stdout.readline()
with terminable(report):
    termination().follow(leader.pid)
    term()
    termination().check()
    print(leader.wait(), flush=True)
    stuck()
"""
    assert run(code) == (143, [f"{-signal.SIGTERM}"])


def test_a_forked_process_ends_as_any_process_and_its_signals_are_not_those_of_this_one() -> None:
    code = """
with terminable(report):
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writer, b"1")
        signal.pause()
    os.read(reader, 1)
    term(pid)
    print(-os.WTERMSIG(os.waitpid(pid, 0)[1]))
    time.sleep(0.5)
    print(termination().received)
"""
    assert run(code) == (0, [f"{-signal.SIGTERM}", "False"])


def test_further_signals_change_nothing_while_the_process_ends() -> None:
    code = """
module.END_LIMIT = 60
with terminable(report):
    try:
        term()
        time.sleep(60)
    except Terminated:
        term()
term()
print("ended")
"""
    assert run(code) == (0, ["ended"])


def test_without_a_signal_everything_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/task"))
    with terminable(lambda reason: None):
        assert termination() is not None
        assert signal.getsignal(signal.SIGTERM) is not before
    assert termination() is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/task")) == threads
