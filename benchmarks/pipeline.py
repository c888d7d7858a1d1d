"""Measure the loss that llm/sparse24_kd_int4 recovers after one-shot 2:4 magnitude pruning and int4 rounding.

The recipe starts from the dense model of the other benchmarks on this text. "Dense, trained further" uses the steps,
learning rates and batches of the two trained stages without compression and teacher. The baseline is the better of
it and the dense model. recovered = (one-shot - row) / (one-shot - baseline), by the loss on the test split. Seeds
change the order of the training data. Runs are stored in ``build/pipeline``, and a stopped benchmark resumes there.

Run: python benchmarks/pipeline.py [--quick] [--jobs 2]
The full mode takes about 25 minutes of one core; --quick tests the mechanics and writes no results.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from harness import Claim, finish
from recovery import BASE, CONTEXT, FULL, VOCABULARY, base_model

from qatkit.pipeline.runner import run_stages
from qatkit.recipe import Recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

SEEDS = (0, 1, 2)
TRAINED = ("sparse24", "int4")
BASELINE = [f"{stage}_alone" for stage in TRAINED]
"""The stages of "dense, trained further", one for each trained stage of the recipe."""
ROWS = {
    "dense": "dense",
    BASELINE[-1]: "dense, trained further",
    "magnitude24": "2:4 by magnitude, one-shot",
    "one_shot": "2:4 by magnitude and round-to-nearest int4, one-shot",
    "sparse24": "2:4, trained + KD",
    "int4": "2:4 and int4, trained + KD",
}
QUICK = [
    "model.args={vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
    "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.2, test_fraction: 0.1}",
    *(f"stages.{stage}.batch_size=64" for stage in ("dense", "magnitude24", "one_shot", "sparse24", "int4")),
    *(f"stages.{stage}.max_steps={steps}" for stage, steps in (("dense", 20), ("sparse24", 6), ("int4", 6))),
    *(f"stages.{stage}.quantize.weight.group_size=16" for stage in ("one_shot", "int4")),
]


def recipe_of(seed: int, base: Path | None) -> Recipe:
    """The recipe with the dense model in a folder (None: a tiny model), and the stages of the baseline."""
    from_base = [
        f"model={{factory: 'qatkit.models:causal_lm', args: {{name_or_path: '{base}'}}}}",
        # the split that the dense model was trained on; one validation, at the end of a stage
        f"data.args={{vocab_size: {VOCABULARY}, context: {CONTEXT}, epoch_batches: 1000}}",
        "stages.dense.max_steps=0",
    ]
    overrides = [f"seed={seed}", "trainer.accelerator=cpu", "trainer.devices=1", *(from_base if base else QUICK)]
    recipe = load_recipe("llm/sparse24_kd_int4", overrides)
    stages, before = dict(recipe.stages), "dense"
    for stage, alone in zip(TRAINED, BASELINE, strict=True):
        stages[alone] = dataclasses.replace(stages[stage], start=before, prune=None, quantize=None, distill=None)
        before = alone
    return dataclasses.replace(recipe, stages=stages)


def measure(seed: int, base: Path | None, folder: Path) -> dict[str, float]:
    """The held-out loss after every stage."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # one run per core
    run = Run(recipe_of(seed, base), folder / f"seed_{seed}")
    run_stages(run)
    return {stage: run.record(stage).metrics["test/loss"] for stage in run.recipe.stages}


def recovered(losses: dict[str, float], stage: str) -> float:
    """The fraction of the one-shot loss that a stage of the same seed recovers."""
    baseline = min(losses["dense"], losses[BASELINE[-1]])
    return (losses["one_shot"] - losses[stage]) / (losses["one_shot"] - baseline)


def rows_of(seeds: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The table: loss and recovered fraction over the seeds."""
    return [
        {
            "model": words,
            "held-out loss": _spread([losses[stage] for losses in seeds], 4),
            "recovered, %": _spread([100 * recovered(losses, stage) for losses in seeds], 1),
        }
        for stage, words in ROWS.items()
    ]


def claims_of(seeds: list[dict[str, float]]) -> list[Claim]:
    """Targets of the recipe."""
    shares = [recovered(losses, "int4") for losses in seeds]
    seen = f"{mean(shares):.1%} ({', '.join(f'{share:.1%}' for share in shares)})"
    return [Claim("loss recovered by 2:4, KD and int4, mean over seeds", ">= 90%", seen, mean(shares) >= 0.9)]


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main(quick: bool, workers: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        seeds, folder = (SEEDS[:1], Path(temporary)) if quick else (SEEDS, Path("build/pipeline"))
        base = None
        if not quick:
            base = (folder / "dense").resolve()
            base_model(FULL, BASE).save_pretrained(base)  # type: ignore[operator]  # a model of transformers
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(measure, seeds, [base] * len(seeds), [folder] * len(seeds)))
    if quick:
        print(*rows_of(found), *claims_of(found), sep="\n")
        return
    finish("pipeline", rows_of(found), claims_of(found), seeds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.quick, arguments.jobs)
