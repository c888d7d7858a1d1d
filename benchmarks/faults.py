"""Faults found by trial: kills, signals, damaged files and mutated recipes, against what qatkit promises for each.

Run: python benchmarks/faults.py [--quick] [--jobs 2] [--only PART] [--resume]
The full mode takes long; --quick tries a few of each kind and writes no results. --only runs one part and keeps the
results of the others; --resume skips what a stopped run of the same code has already tried.

kills    A run is killed (SIGKILL) before each kind of operation on each kind of file, at times spread over the run,
         and between the last step of a stage and its record. The same command then runs to its end: every tensor and
         every number of the run folder that is not a time must equal those of an uninterrupted run.
signals  SIGTERM during training, to either process: all end within 30 s with exit code 143 and a checkpoint, and the
         same command ends as an uninterrupted run.
files    One file of a finished run is damaged. `run`, `verify`, `report` and `export` each name it, or leave the same
         numbers as without the damage.
recipes  Shipped recipes with random changes: each is valid, or refused with one message that names a key. Some of the
         valid ones run: to their end, or to such a message.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fault_files import COMMANDS, Damaged, damages_of, try_damages
from fault_kills import AT_OPERATION, BEFORE_RECORD, BY_CLOCK, kills_of, try_kills, whole_run
from fault_recipes import mutations, try_valid, validate, wrong_with
from fault_runs import do, excerpt, run_arguments, warm
from fault_signals import RECIPE, stops_of, try_stops, whole
from harness import RESULTS, Claim, finish

Row = dict[str, Any]
SHOWN = 40
"""Descriptions of failures that the results keep per row."""


@dataclass(frozen=True)
class Size:
    """Numbers of trials in the full and in the quick mode."""

    kills: tuple[tuple[str, str, int, int, int], ...]
    """Recipe, strategy, and kills at operations, by the clock and before a record."""
    stops: tuple[tuple[str, int], ...]
    """Strategy and signals."""
    damages: tuple[tuple[str, int], ...]
    """Recipe and damaged files."""
    mutated: int
    run: int
    """Valid mutated recipes that are run."""


FULL = Size(
    kills=(
        ("magnitude", "single", 65, 6, 6), ("early_stopping", "single", 32, 6, 6), ("text", "single", 45, 6, 6),
        ("int4", "single", 20, 6, 6), ("magnitude", "ddp", 12, 8, 4), ("int4", "fsdp2", 12, 8, 4),
    ),
    stops=(("single", 20), ("ddp", 20), ("fsdp2", 20)),
    damages=(("magnitude", 112), ("early_stopping", 130), ("text", 70)),
    mutated=3000,
    run=60,
)  # fmt: skip
QUICK = Size(
    kills=(("magnitude", "single", 1, 0, 1),), stops=(), damages=(("magnitude", 2),), mutated=20, run=1
)  # fmt: skip


def row(kind: str, recipe: str, strategy: str, wrong: Sequence[Sequence[str]]) -> Row:
    """A row of the table.

    Args:
        kind: The fault.
        recipe: The recipe, or a count of recipes.
        strategy: single, ddp or fsdp2.
        wrong: What is wrong, for each trial; empty where it was survived.
    """
    for each in wrong:
        if each:
            print(f"{kind}, {recipe}, {strategy}: {'; '.join(each)[:600]}", flush=True)
    failed = ["; ".join(each)[:600] for each in wrong if each]
    counts = {"tried": len(wrong), "survived": len(wrong) - len(failed)}
    return {"kind": kind, "recipe": recipe, "strategy": strategy, **counts, "failed": failed[:SHOWN]}


Tried = Callable[[str, Callable[[], list[Row]]], None]
"""``(name, trials)``: run the trials, unless their rows are already known."""


def kills(size: Size, folder: Path, workers: int, tried: Tried) -> None:
    """Kill runs."""
    covered: set[str] = set()

    def trials(index: int, recipe: str, strategy: str, counts: Sequence[int]) -> list[Row]:
        rows = []
        if strategy != "single":
            warm.with_peers()
        here = folder / f"{recipe}_{strategy}"
        whole = whole_run(here / "whole", recipe, strategy)
        chosen = kills_of(whole, *counts, seed=index, covered=covered)
        found = try_kills(chosen, here, workers)
        for kind in (AT_OPERATION, BY_CLOCK, BEFORE_RECORD):
            pairs = [(kill, wrong) for kill, wrong in zip(chosen, found, strict=True) if kill.kind == kind]
            if pairs:
                wrong = [[f"{kill.place}: {', '.join(wrong)}"] if wrong else [] for kill, wrong in pairs]
                rows.append(row(kind, recipe, strategy, wrong))
        shutil.rmtree(here)
        return rows

    for index, (recipe, strategy, *counts) in enumerate(size.kills):
        tried(f"kills {recipe} {strategy}", partial(trials, index, recipe, strategy, counts))


def signals(size: Size, folder: Path, workers: int, tried: Tried) -> None:
    """Send SIGTERM to runs."""

    def trials(index: int, strategy: str, count: int) -> list[Row]:
        if strategy != "single":
            warm.with_peers()
        expected = whole(folder / f"{strategy}_whole", strategy)
        stops = stops_of(strategy, count, 1.5, seed=index)
        found = try_stops(stops, folder / strategy, expected, workers)
        wrong = [
            [f"process {stop.process} after {stop.after:.2f} s: {', '.join(wrong)}"] if wrong else []
            for stop, wrong in zip(stops, found, strict=True)
        ]
        return [row("SIGTERM in training", RECIPE, strategy, wrong)]

    for index, (strategy, count) in enumerate(size.stops):
        tried(f"signals {strategy}", partial(trials, index, strategy, count))


def files(size: Size, folder: Path, workers: int, tried: Tried) -> None:
    """Damage the files of finished runs."""

    def trials(index: int, recipe: str, count: int) -> list[Row]:
        rows = []
        here = folder / recipe
        ended = do(here, *run_arguments(here, recipe))
        if ended.code:
            raise SystemExit(f"{recipe}: {excerpt(ended)}")
        damages = damages_of(here / "run", count, seed=index)
        found = try_damages(Damaged(here, recipe), damages, folder / f"{recipe}_damaged", workers)
        for command in COMMANDS:
            wrong = [
                [f"{damage.file}, {damage.kind}: {outcomes[command]}"]
                if outcomes[command] not in ("found", "harmless")
                else []
                for damage, outcomes in zip(damages, found, strict=True)
            ]
            rows.append(row(f"damaged file, then `{command}`", recipe, "single", wrong))
        return rows

    for index, (recipe, count) in enumerate(size.damages):
        tried(f"files {recipe}", partial(trials, index, recipe, count))


def recipes(size: Size, folder: Path, workers: int, tried: Tried) -> None:
    """Mutate the shipped recipes."""
    tried("recipes", lambda: mutated_recipes(size, folder, workers))


def mutated_recipes(size: Size, folder: Path, workers: int) -> list[Row]:
    """Validate mutated recipes, and run some of those that are valid."""
    changed = mutations(bases(), size.mutated, seed=0)
    ended = validate(changed, folder / "recipes", workers)
    pairs = list(zip(changed, ended, strict=True))
    found = [wrong_with(end, mutated) for mutated, end in pairs]
    wrong = [
        [f"{pair[0].recipe}, {pair[0].names[:6]}: {each}"] if each else []
        for pair, each in zip(pairs, found, strict=True)
    ]
    valid = [mutated for mutated, end in pairs if end.code == 0]
    count = f"{len({mutated.recipe for mutated in changed})} recipes"
    rows = [row(f"mutated recipe, {len(valid)} of them valid", count, "single", wrong)]
    some = valid[:: max(1, len(valid) // size.run)][: size.run]
    ran = [try_valid(mutated, folder / f"valid_{index}") for index, mutated in enumerate(some)]
    outcomes = ("ran", "refused", "refused in training")
    wrong = [
        [f"{m.recipe}, {m.names}: {each}"] if each not in outcomes else [] for m, each in zip(some, ran, strict=True)
    ]
    counts = ", ".join(f"{ran.count(outcome)} {outcome}" for outcome in outcomes)
    return [*rows, row(f"valid mutated recipe, outcomes: {counts}", count, "single", wrong)]


def bases() -> dict[str, Row]:
    """The shipped recipes as dictionaries, with few steps and small models."""
    from qatkit.recipe.loading import list_recipes, recipe_text
    from qatkit.recipe.strict_yaml import parse_yaml

    found = {}
    for name in list_recipes():
        recipe = parse_yaml(recipe_text(name), name)
        if name.startswith("llm/"):
            small = {"vocab_size": 300, "hidden": 96, "intermediate": 64, "context": 32}
            recipe["model"]["args"] |= small
            if not any("shrink" in stage for stage in recipe["stages"].values()):
                recipe["model"]["args"]["layers"] = 2
            recipe["data"]["args"] |= {"vocab_size": 300, "context": 32, "include": ["email/*"], "val_fraction": 0.2}
        if "evaluate" in recipe:
            recipe["evaluate"] = {"stride": 16}
        _shorten(recipe)
        found[name] = recipe
    return found


def _shorten(value: Any) -> None:
    small = {"max_steps": 3, "group_size": 16, "batch_size": 16, "rounds": 1, "rewind": 1, "calibration_batches": 2}
    for key, part in value.items() if isinstance(value, dict) else ():
        if key in small and isinstance(part, int):
            value[key] = min(part, small[key])
        _shorten(part)


PARTS: dict[str, Callable[[Size, Path, int, Tried], None]] = {
    "kills": kills,
    "signals": signals,
    "files": files,
    "recipes": recipes,
}


def claims_of(rows: dict[str, list[Row]]) -> list[Claim]:
    """What qatkit promises, and how many trials kept it."""
    texts = {
        "kills": "a resumed run is bit-identical",
        "signals": "SIGTERM saves a checkpoint and ends all processes in time",
        "files": "a corrupted file is reported, or changes nothing",
        "recipes": "a mutated recipe is valid, or an error names its key",
    }
    claims = []
    for part, text in texts.items():
        tried, survived = (sum(each[key] for each in rows.get(part, [])) for key in ("tried", "survived"))
        if tried:
            claims.append(Claim(text, f"{tried} of {tried}", f"{survived} of {tried}", survived == tried))
    return claims


def main(quick: bool, workers: int, only: str | None, resume: bool) -> None:
    size = QUICK if quick else FULL
    path = RESULTS / "faults.json"
    stored = json.loads(path.read_text())["trials"] if path.exists() and not quick else {}
    chosen = [part for part in PARTS if only in (None, part)]
    trials: dict[str, list[Row]] = {
        name: rows for name, rows in stored.items() if resume or name.partition(" ")[0] not in chosen
    }

    def tried(name: str, work: Callable[[], list[Row]]) -> None:
        if name not in trials:
            trials[name] = work()
            if not quick:  # so that a run that is stopped here continues with the next
                path.write_text(json.dumps({"trials": trials}, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        for part in chosen:
            PARTS[part](size, Path(folder) / part, workers, tried)
    parts = {part: [row for name in trials if name.partition(" ")[0] == part for row in trials[name]] for part in PARTS}
    rows = [{key: value for key, value in each.items() if key != "failed"} for part in PARTS for each in parts[part]]
    if quick:
        for each in rows:
            print(" | ".join(map(str, each.values())))
        sys.exit(not all(claim.holds for claim in claims_of(parts)))
    try:
        finish("faults", rows, claims_of(parts))
    finally:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trials": trials}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each kind, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--only", choices=PARTS, help="run one part, and keep the results of the others")
    parser.add_argument("--resume", action="store_true", help="keep the trials of a run that was stopped")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.jobs, arguments.only, arguments.resume)
