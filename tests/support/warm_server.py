"""Started by tests/support/warm.py: imports the modules of every command, then forks a process per request.

Usage: warm_server.py SOCKET, with a pipe as standard input whose closing ends the server.

A request is a JSON object with arguments, folder, environment and the numbers of open files, preceded by its length and
these files, of which the first three are the standard streams. The answer is the exit status of the process. Bytes
after a request are signals for it; closing the connection kills it.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# none that starts a thread (onnxruntime)
LOADED = (
    "torch.distributed.fsdp",
    "torch.onnx._internal.exporter._core",
    "lightning.pytorch.strategies",
    "sklearn.datasets",
    "sklearn.model_selection",
    "qatkit.callbacks",
    "qatkit.callbacks.quantization",
    "qatkit.data",
    "qatkit.export.onnx.graph",
    "qatkit.models",
    "qatkit.pipeline.validation",
    "qatkit.pipeline.runner",
    "qatkit.pipeline.export",
    "qatkit.pipeline.verify",
    "qatkit.pipeline.report",
    "qatkit.report.comparison",
    "qatkit.report.sections",
    "qatkit.cli.main",
)
CHATTING = ("transformers.models.llama.modeling_llama", "compressed_tensors.compressors")  # what they import warns


STATUS = 0  # of a forked process


@atexit.register  # before any other, so it runs last
def leave() -> None:
    """Exit a forked process at once, without the seconds that unloading every imported module takes."""
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(STATUS)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard the error stream, also for code that already holds it."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main(path: str) -> tuple[dict[str, Any], list[int]]:
    """Serve forever; the function returns in a forked process, with its request and its open files."""
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    for name in LOADED:
        importlib.import_module(name)
    with silence():
        for name in CHATTING:
            importlib.import_module(name)
        importlib.import_module("exporting").ready()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be forked"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([listener, sys.stdin.buffer], [], [])
        if sys.stdin.buffer in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request, files = read(connection)
            if pid := os.fork():
                for file in files:
                    os.close(file)
                keep(pid, connection)
            connection.close()
            return request, files
        connection.close()


def read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    length, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(256 * array.array("i").itemsize))
    files = array.array("i", ancillary[0][2])
    parts: list[bytes] = []
    while (left := int.from_bytes(length, "big") - sum(map(len, parts))) > 0:
        parts.append(connection.recv(left) or os._exit(1))  # who asked for it has gone
    return json.loads(b"".join(parts)), list(files)


def keep(pid: int, connection: socket.socket) -> NoReturn:
    """Connect a process to the client that requested it."""

    def obey() -> None:
        with contextlib.suppress(OSError):  # it has ended
            while sent := connection.recv(1):
                os.kill(pid, sent[0])
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=obey, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the client was killed
        connection.sendall(status.to_bytes(4, "big"))
    os._exit(0)


def become(
    arguments: list[str], folder: str, environment: dict[str, str], numbers: list[int], files: list[int], python: str
) -> None:
    """Become the process that ``python ARGUMENTS`` would be in this folder and environment, with these open files."""
    away = [fcntl.fcntl(file, fcntl.F_DUPFD, 256) for file in files]  # from the numbers that others will have
    for file in files:
        os.close(file)
    for number, file in zip(numbers, away, strict=True):
        assert number < 3 or not os.path.exists(f"/proc/self/fd/{number}"), f"file {number} is one of the server"
        os.dup2(file, number)
        os.close(file)
    # new ones, as the old ones remember whether the files of the server were seekable
    sys.stdout = os.fdopen(1, "w", encoding=sys.stdout.encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.path[0:1] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    importlib.invalidate_caches()
    if arguments[:1] == ["-B"]:  # multiprocessing hands on the flags of its process
        sys.dont_write_bytecode, arguments = True, arguments[1:]
    kind = arguments[0] if arguments else ""
    if kind not in ("-c", "-m") and (not kind or kind.startswith("-")):
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.executable = python  # the processes that this one starts are forks too
    multiprocessing.set_executable(python)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]  # from which a pool finds this script
    if kind == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    request, files = main(sys.argv[1])
    try:
        become(**request, files=files)
    except SystemExit as ended:
        STATUS = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BaseException:
        STATUS = 1
        raise
