"""Measure the accuracy lost to pruning and recovered by training and a teacher: a digits CNN, and a small Llama.

Every trained row takes the same steps with the same optimizer, "dense trained further" included. For the text,
recovered = (2:4 magnitude - row) / (2:4 magnitude - baseline), by the loss on held-out files; the baseline is the
better of the dense model and the dense model trained further. Seeds change the order of the training data, and for the
CNN its first weights too. Results of jobs are stored in ``results/prune_accuracy_jobs.json``, and a stopped benchmark
resumes there.

Run: python benchmarks/prune_accuracy.py [--quick] [--jobs 2]
The full mode takes hours of one core; --quick tests the mechanics and writes no results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import recovery
from harness import RESULTS, Claim, finish, spread
from pruned import FULL, QUICK, Job, Size, do

SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
STARTS = ("magnitude", "wanda", "sparsegpt")
TRAINED = ("2:4 magnitude, trained", "2:4 magnitude, trained + KD", "2:4 sparsegpt, trained + KD")
JOURNAL = RESULTS / "prune_accuracy_jobs.json"


class Journal:
    """Results of all jobs, written to disk after each."""

    def __init__(self, path: Path, size: Size, folder: Path, base: Path, workers: int) -> None:
        self.path, self.size, self.folder, self.base, self.workers = path, size, folder, base, workers
        self.content: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        dense = recovery.evaluate(recovery.base_model(size.text, base), size.text)
        before = self.content.setdefault("text | dense", {"loss": dense})["loss"]
        if abs(before - dense) > 1e-4:
            raise SystemExit(f"{path} was made from another dense model ({before} and not {dense})")

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that are not finished."""
        todo = [job for job in dict.fromkeys(jobs) if _key(job) not in self.content]
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(do, job, self.size, self.folder, self.base): job for job in todo}
            for count, future in enumerate(as_completed(futures), 1):
                key = _key(futures[future])
                self.content[key] = future.result()
                self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
                print(f"{count}/{len(todo)} {key}: {future.result()}", flush=True)

    def values(self, name: str, task: str, method: str, sparsity: float = 0.0) -> list[float]:
        """A value of a row over the finished seeds."""
        keys = dict.fromkeys(_key(Job(task, method, sparsity, seed)) for seed in SEEDS)
        return [self.content[key][name] for key in keys if key in self.content]


def _key(job: Job) -> str:
    parts = [job.task, job.method, *([f"{job.sparsity:.0%}"] if job.sparsity else [])]
    return " | ".join([*parts, *([f"seed {job.seed}"] if job.seeded else [])])


def all_jobs(journal: Journal, sparsities: Iterable[float], seeds: Iterable[int]) -> None:
    """Run everything: first the dense CNNs, from which the others start."""
    seeds, sparsities = list(seeds), list(sparsities)
    methods = ["one-shot", "gradual", "gradual + KD"]
    jobs = [Job("digits", method, seed=seed) for method in ("dense", "lottery") for seed in seeds]
    jobs += [Job("digits", "dense trained further", seed=seed) for seed in seeds]
    jobs += [Job("digits", method, s, seed) for method in methods for s in sparsities for seed in seeds]
    jobs += [Job("text", method, seed=seed) for method in ("dense trained further", *TRAINED) for seed in seeds]
    jobs += [Job("text", f"2:4 {start}") for start in STARTS]
    jobs += [Job("text", "one-shot", s) for s in sparsities]
    jobs += [Job("text", method, s, seed) for method in methods[1:] for s in sparsities for seed in seeds]
    journal.run(jobs)


def rows_of(journal: Journal, sparsities: Iterable[float]) -> list[dict[str, Any]]:
    """The table: accuracy for the digits, loss and recovered fraction for the text."""
    sparsities = list(sparsities)
    dense = mean(journal.values("accuracy", "digits", "dense"))

    def digits_row(method: str, zeros: list[float], accuracies: list[float]) -> dict[str, Any]:
        return _row("digits", method, zeros, spread(accuracies), f"{(mean(accuracies) - dense) * 100:+.2f}", len(zeros))

    rows = []
    for method, shares in (
        ("dense", [0.0]), ("dense trained further", [0.0]),
        ("one-shot", sparsities), ("gradual", sparsities), ("gradual + KD", sparsities),
    ):  # fmt: skip
        for share in shares:
            found = [journal.values(name, "digits", method, share) for name in ("zeros", "accuracy")]
            rows.append(digits_row(method, *found))
    for sparsity, _ in journal.size.rounds:
        for name, words in (("ticket", "lottery ticket"), ("reinit", "ticket mask, new initialization")):
            found = [journal.values(f"{key} {sparsity:.0%}", "digits", "lottery") for key in ("zeros", name)]
            rows.append(digits_row(words, *found))

    baseline, rounded = _text_scale(journal)
    methods = [
        ("dense trained further", 0.0),
        *((f"2:4 {start}", 0.0) for start in STARTS),
        *((m, 0.0) for m in TRAINED),
    ]
    methods += [("one-shot", share) for share in sparsities]
    methods += [(m, share) for m in ("gradual", "gradual + KD") for share in sparsities]
    rows.append(_row("text", "dense", [0.0], f"{journal.content['text | dense']['loss']:.4f}", "-", 1))
    for method, share in methods:
        losses, zeros = (journal.values(name, "text", method, share) for name in ("loss", "zeros"))
        shown = f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else "")
        recovered = f"{(rounded - mean(losses)) / (rounded - baseline) * 100:.1f}%" if "trained" in method else "-"
        rows.append(_row("text", method, zeros, shown, recovered if "2:4" in method else "-", len(losses)))
    return rows


def _text_scale(journal: Journal) -> tuple[float, float]:
    """The two losses that scale a 2:4 row: the better dense one, and one-shot 2:4 magnitude pruning."""
    rounded = journal.content[_key(Job("text", "2:4 magnitude"))]["loss"]
    dense = journal.content["text | dense"]["loss"]
    return min(dense, mean(journal.values("loss", "text", "dense trained further"))), rounded


def _row(task: str, method: str, zeros: list[float], value: str, against: str, seeds: int) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "zeros": f"{mean(zeros):.1%}",
        "test accuracy, or held-out loss": value,
        "difference from dense, or recovered": against,
        "seeds": seeds,
    }


def claims_of(journal: Journal) -> list[Claim]:
    """Targets of the project and measured values."""
    dense = mean(journal.values("accuracy", "digits", "dense"))
    gradual = mean(journal.values("accuracy", "digits", "gradual + KD", 0.9))
    seen = f"{gradual:.2%} and {dense:.2%}"
    claims = [Claim("digits: gradual + KD at 90% compared with dense", "within 1 point", seen, dense - gradual <= 0.01)]
    ticket, control = (journal.values(f"{name} 90%", "digits", "lottery") for name in ("ticket", "reinit"))
    wide = max(stdev(ticket), stdev(control))
    seen = f"{spread(ticket)} and {spread(control)}"
    text = "digits: lottery ticket compared with new initialization at 90%"
    claims.append(Claim(text, "higher by more than the spread", seen, mean(ticket) - mean(control) > wide))
    baseline, rounded = _text_scale(journal)
    for method in TRAINED[1:]:
        share = (rounded - mean(journal.values("loss", "text", method))) / (rounded - baseline)
        claims.append(Claim(f"text: loss recovered by {method}", ">= 94%", f"{share * 100:.1f}%", share >= 0.94))
    return claims


def main(quick: bool, jobs: int) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "jobs.json", QUICK, Path(folder), Path(folder) / "base.safetensors", jobs)
            all_jobs(journal, (0.5, 0.9), SEEDS[:2])
            for row in rows_of(journal, (0.5, 0.9)):
                print(" | ".join(map(str, row.values())))
            for claim in claims_of(journal):
                print(claim.text)
        return
    folder = Path("build/prune_accuracy")
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(JOURNAL, FULL, folder, recovery.BASE, jobs)
    all_jobs(journal, SPARSITIES, SEEDS)
    finish("prune_accuracy", rows_of(journal, SPARSITIES), claims_of(journal), SEEDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.quick, arguments.jobs)
