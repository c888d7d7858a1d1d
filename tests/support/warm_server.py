"""Started by tests/support/warm.py: imports the modules of every command, then forks a process per request.

Usage: warm_server.py SOCKET, with a pipe as standard input whose closing ends the server.

A request is a JSON object with arguments, folder and environment, preceded by its length and the three standard
streams. The answer is the exit status of the process. Bytes after a request are signals for it; closing the
connection kills it.
"""

from __future__ import annotations

import array
import atexit
import contextlib
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
    "qatkit.callbacks",
    "qatkit.data",
    "qatkit.models",
    "qatkit.pipeline.validation",
    "qatkit.pipeline.runner",
    "qatkit.pipeline.export",
    "qatkit.pipeline.verify",
    "qatkit.pipeline.report",
    "qatkit.cli.main",
)
CHATTING = ("transformers.models.llama.modeling_llama", "compressed_tensors.compressors")  # what they import warns


STATUS = 0  # of a forked process


@atexit.register  # before any other, so it runs last
def leave() -> None:
    """Exit a forked process at once, without the seconds that unloading every imported module takes."""
    sys.stdout.flush()
    sys.stderr.flush()
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
    """Serve forever; the function returns in a forked process, with its request and its standard streams."""
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
            request, streams = read(connection)
            if pid := os.fork():
                for stream in streams:
                    os.close(stream)
                keep(pid, connection)
            connection.close()
            return request, streams
        connection.close()


def read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size = 3 * array.array("i").itemsize
    length, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(size))
    streams = array.array("i", ancillary[0][2][:size])
    parts: list[bytes] = []
    while (left := int.from_bytes(length, "big") - sum(map(len, parts))) > 0:
        parts.append(connection.recv(left) or os._exit(1))  # who asked for it has gone
    return json.loads(b"".join(parts)), list(streams)


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


def become(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int], python: str) -> None:
    """Become the process that ``python ARGUMENTS`` would be in this folder and environment."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
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
    kind = arguments[0] if arguments else ""
    if kind not in ("-c", "-m") and (not kind or kind.startswith("-")):
        os.execv(sys.executable, [sys.executable, *arguments])
    multiprocessing.set_executable(sys.executable)  # it hands on more than the standard streams
    sys.executable = python  # the processes that this one starts are forks too
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
    request, streams = main(sys.argv[1])
    try:
        become(**request, streams=streams)
    except SystemExit as ended:
        STATUS = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BaseException:
        STATUS = 1
        raise
