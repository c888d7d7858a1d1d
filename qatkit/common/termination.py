"""SIGTERM handling: a command ends with one message and exit code 143, at once or after its work has been saved.

A Python signal handler runs only when the main thread returns to Python, which it may not do while it waits for another
process. A thread therefore also waits for the signal and ends the process at a deadline.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen, TimeoutExpired

CODE = 143  # 128 + SIGTERM
STEP_LIMIT = 20.0
"""Seconds in which training must reach a point where it can be saved; the write itself has no limit."""
END_LIMIT = 5.0
"""Seconds in which a process must end in other cases, such as outside training or after a checkpoint was written."""
_LAG = 2.0
"""Additional seconds that the other processes of a run wait for the first one, which ends them."""


class Terminated(BaseException):
    """Raised after SIGTERM. It is not an `Exception`, so that error handlers do not catch it."""


class Termination:
    """The reaction of this process to SIGTERM.

    Args:
        report: Prints the last message of a process that is ended at its deadline; called with the reason.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.received = False
        self.saved = ""
        """Describes what was saved because of the signal, for the message."""
        self.hint: Callable[[], str] = str
        """Returns advice about resuming, for the message."""
        self.children: list[Callable[[], list[Popen[bytes]]]] = []
        """Functions that return processes started by this one, which must not outlive it."""
        self.follows = False
        """Whether another process of a distributed run decides when this one ends, and prints the message."""
        self._leader: int | None = None
        self._report = report
        self._deferred = self._saving = False
        self._deadline: float | None = None
        self._ending: list[Popen[bytes]] = []
        self._closed = threading.Event()

    def follow(self, leader: int | None) -> None:
        """Let rank 0 of a distributed run decide how to end.

        Args:
            leader: The process ID of rank 0 if it runs on this host; the signal is forwarded to it.
        """
        self.follows, self._leader = True, leader

    def defer(self, deferred: bool) -> None:
        """Set whether the main thread keeps running after the signal because it checks `received` itself."""
        self._deferred = deferred
        if self.received and not deferred:
            self._deadline = time.monotonic() + END_LIMIT

    def check(self) -> None:
        """Raise `Terminated` if the signal was received while it was deferred.

        Raises:
            Terminated: the signal was received, and this process decides how to end.
        """
        if self.received and not self.follows:
            raise Terminated

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Suspend the deadline while a checkpoint is written."""
        self._saving = True
        try:
            yield
        finally:
            self._deadline = time.monotonic() + END_LIMIT
            self._saving = False

    def release_children(self) -> None:
        """Stop other code from monitoring the child processes of this process."""
        for children in self.children:
            started = children()
            self._ending += started
            started.clear()  # Lightning kills this process when one of them ends with an error

    def end_children(self, seconds: float) -> None:
        """Terminate the child processes of this process, and kill those that have not ended after a few seconds."""
        self.release_children()
        deadline = time.monotonic() + seconds
        for child in self._ending:
            child.terminate()
        for child in self._ending:
            with suppress(TimeoutExpired):
                child.wait(max(deadline - time.monotonic(), 0))
            child.kill()

    def handle(self, number: int, frame: object) -> None:
        """The signal handler of the main thread.

        Raises:
            Terminated: the signal is not deferred.
        """
        if not self.received:
            self.received = True
            if not (self._deferred or self.follows):
                raise Terminated

    def watch(self, signals: socket.socket) -> None:
        """Wait for the signal, forward it to rank 0, and end this process at the deadline."""
        while (numbers := signals.recv(64)) and signal.SIGTERM not in numbers:
            pass
        if not numbers or self._closed.is_set():
            return
        if self._deadline is None:  # the main thread may be faster
            limit = STEP_LIMIT if self._deferred or self.follows else END_LIMIT
            self._deadline = time.monotonic() + limit + (_LAG if self.follows else 0.0)
        if self._leader is not None:
            with suppress(OSError):
                os.kill(self._leader, signal.SIGTERM)
        while not self._closed.wait(0.1):
            if time.monotonic() > self._deadline and not self._saving:
                self.end_children(0)
                if not self.follows:
                    late = f"no training step ended within {STEP_LIMIT:g} s" if self._deferred else ""
                    self._report(self.saved or late)
                os._exit(CODE)

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()


_current: Termination | None = None


def termination() -> Termination | None:
    """Return how this process reacts to SIGTERM; None if qatkit does not handle it."""
    return _current


@contextmanager
def terminable(report: Callable[[str], None]) -> Iterator[None]:
    """Handle SIGTERM during the block, unless it runs outside the main thread.

    Args:
        report: See `Termination`.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    this = Termination(report)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=this.watch, args=(reader,), name="termination", daemon=True)
    thread.start()
    before, _current = _current, this
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, this.handle)
    try:
        yield
    finally:
        if this.received:  # the process ends: the thread keeps the deadline, and the handler ignores further signals
            signal.set_wakeup_fd(-1)
            this.end_children(END_LIMIT / 2)
        else:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
            this.close()
            writer.close()
            thread.join()
            reader.close()
        _current = before


def _forget() -> None:
    """Let a forked process react to SIGTERM as any process does, and not write to the socket of this one."""
    global _current
    if _current is not None:
        _current = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
