"""Measure whether a teacher helps: both distillation recipes over three seeds, with and without a teacher.

Both students of a seed start from the same weights and see the same batches in the same order for the same number of
steps; only the loss differs. Metrics on held-out data: accuracy for digits, loss in nats per token for text.

Run: python benchmarks/distill_recipes.py [--quick] [--jobs 2] [--only RECIPE]
The full mode takes some minutes on two cores and writes the logs beside the recipes; --quick tests the mechanics in
less than a minute and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from harness import RESULTS, Claim, finish

from qatkit.pipeline.runner import run_stages
from qatkit.recipe import Recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

ROOT = Path(__file__).parent.parent
SEEDS = [0, 1, 2]
METRICS = {"vision/digits_distill": "test/accuracy", "llm/distill_layers": "test/loss"}
TEACHERS = {"vision/digits_distill": "teacher", "llm/distill_layers": "dense"}
QUICK = {
    "vision/digits_distill": ["teacher.max_steps=40", "alone.max_steps=20", "distilled.max_steps=20"],
    "llm/distill_layers": ["dense.max_steps=6", "alone.max_steps=4", "distilled.max_steps=4"],
}
SMALL = {
    "vision/digits_distill": ["model.args.channels=[8,8]"],
    "llm/distill_layers": [
        "model.args={vocab_size: 300, hidden: 32, layers: 6, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
        "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1}",
    ],
}


def recipe_of(name: str, seed: int, quick: bool) -> Recipe:
    """The recipe with this seed; in quick mode with few steps and a tiny model."""
    short = [*SMALL[name], *(f"stages.{override}" for override in QUICK[name])] if quick else []
    return load_recipe(name, [f"seed={seed}", "trainer.accelerator=cpu", *short])


def measure(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train every stage of a recipe and read its held-out metrics."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe_of(name, seed, quick), Path(folder))
        run_stages(run)
        records = [run.record(stage) for stage in run.recipe.stages]
    metric = METRICS[name]
    seconds = sum(record.seconds for record in records)
    return {"recipe": name, "seed": seed, "seconds": seconds} | {r.name: r.metrics[metric] for r in records}


def margin(job: dict[str, Any]) -> float:
    """Improvement of the student with a teacher; positive is better for every metric."""
    difference: float = job["distilled"] - job["alone"]
    return difference if METRICS[job["recipe"]] == "test/accuracy" else -difference


def row(name: str, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """One recipe over all seeds."""
    margins = [margin(job) for job in jobs]
    return {
        "recipe": name,
        "measured": "accuracy, %" if METRICS[name] == "test/accuracy" else "loss, nats per token",
        "teacher": _spread(name, [job[TEACHERS[name]] for job in jobs]),
        "student alone": _spread(name, [job["alone"] for job in jobs]),
        "student with teacher": _spread(name, [job["distilled"] for job in jobs]),
        "margin": _spread(name, margins),
        "seeds won": f"{sum(value > 0 for value in margins)} of {len(margins)}",
    }


def claims_of(name: str, jobs: list[dict[str, Any]]) -> list[Claim]:
    """Check that the teacher helps, and that nothing else differs."""
    margins = [margin(job) for job in jobs]
    stages = recipe_of(name, 0, quick=False).stages
    same = dataclasses.replace(stages["distilled"], distill=None) == stages["alone"]
    return [
        Claim(f"{name}: margin of the distilled student, mean", "> 0", _spread(name, margins), mean(margins) > 0),
        Claim(f"{name}: both students train alike but for the teacher", "yes", "yes" if same else "no", same),
    ]


def write_log(name: str) -> None:
    """Write the rows of the recipe as Markdown beside it, from the results file."""
    content = json.loads((RESULTS / "distill_recipes.json").read_text())
    jobs = [job for job in content["jobs"] if job["recipe"] == name]
    stages = [key for key in jobs[0] if key not in ("recipe", "seed", "seconds")]
    summary = next(row for row in content["rows"] if row["recipe"] == name)
    versions = ", ".join(f"{package} {number}" for package, number in content["versions"].items())
    lines = [
        f"# {name}",
        "",
        f"Written by `python benchmarks/distill_recipes.py`; held-out {summary['measured']}, after each stage.",
        "",
        "| seed | " + " | ".join(stages) + " | margin | seconds |",
        "|" + " --- |" * (len(stages) + 3),
    ]
    scale, digits = (100, 2) if METRICS[name] == "test/accuracy" else (1, 4)
    for job in jobs:
        cells = [f"{job[stage] * scale:.{digits}f}" for stage in stages]
        cells += [f"{margin(job) * scale:+.{digits}f}", f"{job['seconds']:.0f}"]
        lines.append(f"| {job['seed']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Margin of the student with a teacher over the same student without one: {summary['margin']}, "
        f"positive for {summary['seeds won']} seeds.",
        "",
        f"{content['machine']['cpus']} CPU cores, one thread per run; {versions}.",
    ]
    (ROOT / "recipes" / f"{name}.md").write_text("\n".join(lines) + "\n")


def _spread(name: str, values: list[float]) -> str:
    share = METRICS[name] == "test/accuracy"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values) * 100:.2f} ± {deviation * 100:.2f}" if share else f"{mean(values):.4f} ± {deviation:.4f}"


def main(quick: bool, workers: int, only: str | None) -> None:
    seeds = SEEDS[:1] if quick else SEEDS
    names = [only] if only else list(reversed(METRICS))  # the long ones first
    measure_all = [(name, seed, quick) for seed in seeds for name in names]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = list(pool.map(measure, *zip(*measure_all, strict=True)))
    if only and not quick:
        before = json.loads((RESULTS / "distill_recipes.json").read_text())["jobs"]
        jobs += [job for job in before if job["recipe"] != only]
    by_recipe = {name: [job for job in jobs if job["recipe"] == name] for name in METRICS if name in names or not quick}
    rows = [row(name, found) for name, found in by_recipe.items()]
    if quick:
        for job in jobs:
            print(" | ".join(f"{key} {value}" for key, value in job.items()))
        print(*rows, sep="\n")
        return
    claims = [claim for name in METRICS for claim in claims_of(name, by_recipe[name])]
    try:
        finish("distill_recipes", rows, claims, seeds)
    finally:  # whatever the claims say, the logs are of this run
        path = RESULTS / "distill_recipes.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"jobs": jobs}, indent=1) + "\n")
        for name in METRICS:
            write_log(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, tiny models, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", choices=METRICS, help="run one recipe, and keep what the other gave")
    parser.add_argument("--logs", action="store_true", help="only write the logs again from the results")
    arguments = parser.parse_args()
    if arguments.logs:
        for shipped in METRICS:
            write_log(shipped)
        sys.exit(0)
    main(arguments.quick, arguments.jobs, arguments.only)
