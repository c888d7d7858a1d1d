"""Run the trials of a sweep in processes of their own, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qatkit.common.termination import STEP_LIMIT, termination
from qatkit.pipeline.processes import as_launcher
from qatkit.trials.sweep import Trial

OUTPUT = "output.txt"
"""The file in a run's folder with the output of its process."""
_POLL = 0.1
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Ended:
    """The end of a trial's process."""

    code: int
    """Its exit code; negative for the number of the signal that ended it."""
    seconds: float
    message: str
    """The last error in its output; empty if it succeeded."""


@dataclass
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    began: float
    output: IO[bytes]
    start: int
    """The size of the output file before this attempt."""


def run_trials(
    trials: Sequence[Trial],
    jobs: int,
    options: Sequence[str],
    started: Callable[[Trial], None],
    ended: Callable[[Trial, Ended], None],
) -> dict[int, Ended]:
    """Train, export and verify trials in processes of ``qatkit run``, which end when this process ends.

    Two trials that need the same unfinished stage do not run at the same time, so that each stage is trained once.

    Args:
        trials: The trials.
        jobs: Number of processes at a time.
        options: Options of ``qatkit run``, such as ``--allow``.
        started: Called when a trial starts.
        ended: Called when a trial has ended.

    Returns:
        How each trial ended, by its number.

    Raises:
        Terminated: this process received SIGTERM; the trials have saved checkpoints.
    """
    waiting, running, results = list(trials), list[_Running](), dict[int, Ended]()
    ending = termination()
    if ending is not None:
        ending.defer(True)
    try:
        with as_launcher():
            while waiting or running:
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    results[each.trial.number] = result = _result(each)
                    ended(each.trial, result)
                while len(running) < jobs and (trial := _next(waiting, running)) is not None:
                    waiting.remove(trial)
                    slot = min(set(range(jobs)) - {each.slot for each in running})
                    started(trial)
                    running.append(_start(trial, slot, jobs, options))
                if ending is not None:
                    ending.check()
                time.sleep(_POLL)
    finally:
        _end(running)
        if ending is not None:
            ending.defer(False)
    return results


def _next(waiting: Sequence[Trial], running: Sequence[_Running]) -> Trial | None:
    """The first trial that needs no stage that another trial is about to compute."""
    busy = {folder for each in running for folder in each.trial.unfinished}
    return next((trial for trial in waiting if busy.isdisjoint(trial.unfinished)), None)


def _start(trial: Trial, slot: int, jobs: int, options: Sequence[str]) -> _Running:
    out = trial.run.out
    command = [sys.executable, "-m", "qatkit.cli", "run", str(out / "recipe.yaml"), "--out", str(out), "--no-report"]
    output = (out / OUTPUT).open("ab")
    start = output.tell()
    process = subprocess.Popen(
        [*command, *options],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=process_environment(os.environ, slot, jobs, _cpus(), _gpus()),
    )
    return _Running(trial, process, slot, time.monotonic(), output, start)


def process_environment(
    before: Mapping[str, str], slot: int, jobs: int, cpus: int, gpus: Sequence[str]
) -> dict[str, str]:
    """Return the environment of a trial's process: with several at a time, each has its part of the CPUs and GPUs.

    Args:
        before: The environment of this process; a number of threads in it is kept.
        slot: The place of the process among those that run at a time, from 0.
        jobs: Number of processes at a time.
        cpus: Number of CPUs.
        gpus: IDs of the GPUs. If there are fewer than processes, several processes use the same one.

    Example:
        >>> process_environment({}, slot=1, jobs=2, cpus=8, gpus=["0", "1", "2", "3"])
        {'OMP_NUM_THREADS': '4', 'CUDA_VISIBLE_DEVICES': '1,3'}
    """
    environment = dict(before)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpus // jobs)))
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::jobs] or [gpus[slot % len(gpus)]])
    return environment


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    import torch

    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def _result(each: _Running) -> Ended:
    each.output.close()
    code, path = each.process.returncode, each.trial.run.out / OUTPUT
    message = "" if code == 0 else _last_error(path, each.start, code)
    return Ended(code, time.monotonic() - each.began, message)


def _last_error(path: Path, start: int, code: int) -> str:
    """The last error in the output of this attempt, which follows the output of earlier ones."""
    if code < 0:
        return f"the process was ended by signal {-code}"
    lines = path.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    start = max((index for index, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
    return "\n".join(lines[start:]).removeprefix("error: ").strip() or f"the process ended with code {code}"


def _end(running: Sequence[_Running]) -> None:
    """Let processes save checkpoints, and end them."""
    for each in running:
        each.process.terminate()
    deadline = time.monotonic() + STEP_LIMIT
    for each in running:
        with suppress(subprocess.TimeoutExpired):
            each.process.wait(max(deadline - time.monotonic(), 0))
        each.process.kill()
        each.process.wait()
        each.output.close()
