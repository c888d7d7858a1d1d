"""Kills of `faults.py`: SIGKILL at operations of the file system, by the clock, and before a stage's record."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fault_runs import Command, contents, differing, do, run_arguments

AT_OPERATION, BY_CLOCK, BEFORE_RECORD = (
    "SIGKILL at a file operation",
    "SIGKILL after a set time",
    "SIGKILL between the last step and the record",
)


@dataclass
class Whole:
    """An uninterrupted run."""

    recipe: str
    strategy: str
    folder: Path
    contents: dict[str, str]
    operations: list[str]
    seconds: float


@dataclass(frozen=True)
class Kill:
    """Where a run is killed: before an operation of the first process, or at a time."""

    kind: str
    whole: Whole = field(repr=False)
    at: int = 0
    """The number of the operation."""
    after: float = 0.0
    """Seconds."""
    process: int = 0
    """The process that is killed by the clock; the others end by themselves."""

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return self.whole.operations[self.at - 1] if self.at else f"{self.after:.2f} s, process {self.process}"


def whole_run(folder: Path, recipe: str, strategy: str, pages: bool = False) -> Whole:
    """Run a recipe to its end, and record its operations."""
    arguments = run_arguments(folder, recipe, strategy)
    fault = {"folder": str(folder / "run"), "log": str(folder / "operations"), "pages": pages}
    ended = do(folder, *arguments, fault=fault)
    if ended.code:
        raise SystemExit(f"{recipe}, {strategy}: exit {ended.code}\n{ended.said[-2000:]}")
    operations = (folder / "operations").read_text().splitlines()
    return Whole(recipe, strategy, folder, contents(folder / "run"), operations, ended.seconds)


def kills_of(whole: Whole, operations: int, clock: int, before_record: int, seed: int, covered: set[str]) -> list[Kill]:
    """Choose kills of a run.

    Args:
        whole: The uninterrupted run.
        operations: Most kills at operations; each kind of operation on each kind of file gets one before any gets two,
            kinds that are not covered yet first.
        clock: Kills at times spread over the run.
        before_record: Most kills between the last step of a stage and its record.
        seed: Chooses among the operations of one kind.
        covered: The kinds that had a kill in another run; those of this one are added.
    """
    chance = random.Random(seed)
    window = _before_record(whole.operations)
    kinds: dict[str, list[int]] = {}
    for number, name in enumerate(whole.operations, 1):
        kinds.setdefault(_kind(name), []).append(number)
    kinds = dict(sorted(kinds.items(), key=lambda item: item[0] in covered))
    for numbers in kinds.values():
        chance.shuffle(numbers)
    turns = [numbers[turn] for turn in range(max(map(len, kinds.values()))) for numbers in kinds.values()
             if turn < len(numbers)]  # fmt: skip
    chosen = [Kill(AT_OPERATION, whole, at) for at in sorted(turns[:operations])]
    covered.update(_kind(kill.place) for kill in chosen)
    step = max(1, len(window) // before_record) if before_record else len(window)
    chosen += [Kill(BEFORE_RECORD, whole, at) for at in window[::step][:before_record]]
    processes = 1 if whole.strategy == "single" else 2
    for index in range(clock):
        after = whole.seconds * (index + chance.random()) / clock
        chosen.append(Kill(BY_CLOCK, whole, after=after, process=index % processes))
    return chosen


def _kind(operation: str) -> str:
    """An operation without the names of stages and attempts."""
    return re.sub(r"(?<=stages/)[^/]+|(?<=export/)\.?[^/.]+|(?<=attempt_)\d+", "*", operation)


def _before_record(operations: Sequence[str]) -> list[int]:
    """The numbers of the operations between the last checkpoint of a stage and its record."""
    numbers: list[int] = []
    inside = False
    for number, name in enumerate(operations, 1):
        inside = (inside or name == "call refuse_non_finite") and not name.startswith("call delete_checkpoints")
        if inside:
            numbers.append(number)
    return numbers


def try_kill(kill: Kill, folder: Path) -> list[str]:
    """Kill a run, run it again to its end, and return what is wrong with the result; the folder is removed."""
    whole = kill.whole
    arguments = run_arguments(folder, whole.recipe, whole.strategy)
    if (whole.folder / "cache").exists():  # the tokenizer, which no run changes
        shutil.copytree(whole.folder / "cache", folder / "cache")
    fault = {"folder": str(folder / "run"), "at": kill.at}
    killed = Command(folder, arguments, fault)
    if not kill.at:
        time.sleep(kill.after)
        ids = killed.ids
        if killed.process.poll() is None and ids:
            os.kill(ids[min(kill.process, len(ids) - 1)], signal.SIGKILL)
    first = killed.end()
    wrong = ["the other process hangs"] if first.hung else []
    if kill.at and first.code != -signal.SIGKILL and whole.strategy == "single":
        wrong.append(f"it was not killed: exit {first.code} {first.said[-300:]}")
    again = do(folder, *arguments)
    if again.code:
        wrong.append(f"exit {again.code} when run again: {again.said[-500:]}")
    else:
        wrong += differing(contents(folder / "run"), whole.contents)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


def try_kills(kills: Sequence[Kill], folder: Path, workers: int) -> list[list[str]]:
    """Try all kills, several at a time."""
    folders = [folder / f"kill_{index}" for index in range(len(kills))]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(try_kill, kills, folders))
