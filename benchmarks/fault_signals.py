"""SIGTERM during training, for `faults.py`: every process ends in time, with a checkpoint, and the run continues."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fault_runs import RECIPES, Command, contents, differing, do, excerpt, run_arguments

RECIPE = "magnitude"
STEPS = ("stages.dense.max_steps=300", "stages.ramp.max_steps=300")
"""Long enough to receive the signal in training."""
ENDS_WITHIN = 30.0
"""Seconds from the signal to the end of the last process."""
TERMINATED = 143


@dataclass(frozen=True)
class Stop:
    """One signal: to which process, and how many seconds after training has started."""

    strategy: str
    process: int
    after: float


def stops_of(strategy: str, count: int, seconds: float, seed: int) -> list[Stop]:
    """Spread signals over the first seconds of training, alternately to each process."""
    chance = random.Random(seed)
    processes = 1 if strategy == "single" else 2
    return [Stop(strategy, i % processes, seconds * (i + chance.random()) / count) for i in range(count)]


def whole(folder: Path, strategy: str) -> dict[str, str]:
    """What an uninterrupted run holds."""
    ended = do(folder, *run_arguments(folder, RECIPE, strategy, *STEPS))
    if ended.code:
        raise SystemExit(f"{RECIPE}, {strategy}: {excerpt(ended)}")
    return contents(folder / "run")


def try_stop(stop: Stop, folder: Path, expected: dict[str, str]) -> list[str]:
    """Stop a run, run it again to its end, and return what is wrong; the folder is removed."""
    assert RECIPE in RECIPES
    arguments = run_arguments(folder, RECIPE, stop.strategy, *STEPS)
    command = Command(folder, arguments)
    processes = 1 if stop.strategy == "single" else 2
    logs = folder / "run" / "stages" / "dense" / "logs"
    while command.process.poll() is None and not (logs.exists() and len(command.ids) == processes):
        time.sleep(0.005)
    time.sleep(stop.after)
    ids = command.ids
    if len(ids) == processes:
        os.kill(ids[stop.process], signal.SIGTERM)
    ended = command.end(ENDS_WITHIN)
    wrong = []
    if ended.hung:
        wrong.append(f"a process runs {ENDS_WITHIN:.0f} s after the signal")
    elif ended.code != TERMINATED:
        wrong.append(excerpt(ended))
    stages = folder / "run" / "stages"
    saved = [*stages.glob("*/last.ckpt"), *stages.glob("*/stage.json")]
    if not saved and "has no checkpoint yet" not in ended.said:  # before the first step there is nothing to save
        wrong.append(f"nothing was saved: {excerpt(ended)}")
    again = do(folder, *arguments)
    wrong += [excerpt(again)] if again.code else differing(contents(folder / "run"), expected)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def try_stops(stops: Sequence[Stop], folder: Path, expected: dict[str, str], workers: int) -> list[list[str]]:
    """Try all stops, several at a time."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda pair: try_stop(pair[1], folder / f"stop_{pair[0]}", expected), enumerate(stops))
        return list(found)
