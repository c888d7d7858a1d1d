"""A forked process behaves like one that Python starts: arguments, streams, folder, environment and exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import warm

SEEN = (
    "import os, sys; print(sys.argv[1:], sys.stdin.read(), os.getcwd(), dict(os.environ), __name__);"
    "print(sys.path[:2], os.isatty(1), 'torch' in sys.modules, file=sys.stderr)"
)


def both(folder: Path, *arguments: str, **environment: str) -> list[tuple[int, str, str]]:
    found = []
    for python in (sys.executable, warm.python()):
        done = subprocess.run(
            [python, *arguments], input="typed", env={"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8", **environment},
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        found.append((done.returncode, done.stdout, done.stderr))
    return found


def test_code_and_scripts_see_what_they_would_see_and_torch_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    for arguments in (["-c", SEEN, "a", "-b"], [str(tmp_path / "seen.py"), "a b"]):
        cold, forked = both(tmp_path, *arguments, PYTHONPATH="/some/where", OTHER="ä")
        assert forked[:2] == cold[:2]
        assert forked[2] == cold[2].replace("False False", "False True")


def test_modules_are_found_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys; print(sys.argv[1:], __spec__.name, __name__)")
    cold, forked = both(tmp_path, "-m", "mine", "a")
    assert forked == cold
    assert "['a'] mine" in forked[1]


@pytest.mark.parametrize(
    "code", ["", "exit(3)", "exit('said')", "1 / 0", "import atexit; atexit.register(print, 'last'); exit()"]
)
def test_it_ends_as_it_would(code: str, tmp_path: Path) -> None:
    cold, forked = both(tmp_path, "-c", code)
    assert forked[:2] == cold[:2]
    assert forked[2].splitlines()[-1:] == cold[2].splitlines()[-1:]


def test_signals_and_kills_reach_it(tmp_path: Path) -> None:
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    for sent in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(sent)
        assert process.wait() == -sent
        process.stdout.read()  # ends with the process itself
        while Path(f"/proc/{pid}").exists():  # its streams close before it is gone
            time.sleep(0.01)


def test_a_process_killed_from_inside_says_so(tmp_path: Path) -> None:
    done = subprocess.run([warm.python(), "-c", "import os; os.kill(os.getpid(), 9)"], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL


POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
def seen(number):
    return number, "torch" in sys.modules
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        print(list(pool.map(seen, range(5))))
"""


def test_the_processes_of_its_pools_are_forked_too(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    cold, forked = both(tmp_path, "pool.py")
    assert cold == (0, f"{[(number, False) for number in range(5)]}\n", "")
    assert forked == (0, cold[1].replace("False", "True"), "")


def test_what_this_process_starts_is_forked_inside_children_only(tmp_path: Path) -> None:
    code = "import sys; print('torch' in sys.modules)"
    said = []
    with warm.children():
        said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert said == ["True\n", "False\n"]
