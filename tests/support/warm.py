"""Start real processes without the seconds for importing torch and Lightning, and for exiting.

``python()`` and ``qatkit()`` are commands that behave like those of the environment, with their own folder,
environment, standard streams, signals and exit code. A server that has imported everything forks them. Tests of
imports, or of a process from its first line on, use ``sys.executable``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# as it is before any test changes it; libraries read some of it when they are imported
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
SERVER = Path(__file__).with_name("warm_server.py")
CLIENT = """#!{executable} -IS
import array, json, os, signal, socket, sys
pool = any("multiprocessing" in argument for argument in sys.argv)  # it uses files that its parent has opened
inherited = [number for number in range(3, 256) if pool and os.path.exists(f"/proc/self/fd/{{number}}")]
path, executable, arguments = {path!r}, {executable!r}, {prefix!r} + sys.argv[1:]
if int(os.environ.get("LOCAL_RANK", 0)):  # Lightning starts the second of two processes
    path += "_of_peers"
    if not os.path.exists(path):
        os.execv(executable, [executable, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect(path)
numbers = [0, 1, 2, *inherited]
request = dict(
    arguments=arguments, folder=os.getcwd(), environment=dict(os.environ), python={python!r}, numbers=numbers
)
data = json.dumps(request).encode()
server.sendmsg([len(data).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))])
server.sendall(data)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = int.from_bytes(server.recv(4), "big")
if os.WIFSIGNALED(status):
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.WEXITSTATUS(status))
"""


def serve(path: Path) -> None:
    """Start a server that ends with this process."""
    command = [sys.executable, str(SERVER), str(path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=path.parent)
    atexit.register(server.kill)
    assert server.stdout is not None
    said = server.stdout.readline()
    assert said == b"ready\n", f"the server of tests/support/warm.py did not start: {said!r}, {server.poll()}"


@functools.cache
def commands() -> Path:
    """A folder for PATH with the commands python and qatkit; that of its own server in a forked process."""
    if (own := Path(sys.executable).parent / "socket").exists():
        return own.parent
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    serve(folder / "socket")
    for name, prefix in (("python", []), ("qatkit", [str(Path(sys.executable).with_name("qatkit"))])):
        command, paths = folder / name, {"path": str(folder / "socket"), "python": str(folder / "python")}
        command.write_text(CLIENT.format(executable=sys.executable, prefix=prefix, **paths))
        command.chmod(0o755)
    return folder


def python() -> str:
    return str(commands() / "python")


def qatkit() -> str:
    return str(commands() / "qatkit")


@functools.cache
def with_peers() -> None:
    """Fork the second of two processes from its own server.

    Processes of one server share the iteration order of sets, so that a test of both would prove less.
    """
    if not (peers := commands() / "socket_of_peers").exists():
        serve(peers)


@contextlib.contextmanager
def children() -> Iterator[None]:
    """Fork the processes that this one starts with ``sys.executable`` or with multiprocessing, too."""
    cold = sys.executable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python())
        multiprocessing.set_executable(python())
        yield
        multiprocessing.set_executable(cold)
