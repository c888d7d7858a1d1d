"""Measure the loss that training recovers after quantization, on a small Llama and real text, in every format.

Every trained row takes the same steps on the same tokens and gets the same sweep of learning rates, including "dense,
trained further". The baseline is the better of the dense model and the dense model trained further: recovered = (RTN -
row) / (RTN - baseline), by the loss on held-out files. Seeds change the order of the training data. Results of jobs
are stored in ``results/qat_recovery_jobs.json``, and a stopped benchmark resumes there.

Run: python benchmarks/qat_recovery.py [--quick] [--jobs 2]
The full mode takes hours; --quick tests the mechanics in minutes and writes no results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import RESULTS, Claim, finish
from recovery import BASE, FORMATS, FULL, QUICK, Job, Size, base_model, do, evaluate, mixed_layers

RATES = (3e-4, 1e-3)
SEEDS = (0, 1, 2)
AGAINST_TORCHAO = ("W3 g32", "W2 g32")
HEADLINES = ("W4 channel", "W3 g32", "W2 g32", "ternary", "W4A8", "W4A4", "W4A4 g32")
STARTS = (("W2 g32", "rtn"), ("W2 g32", "gptq"), ("W2 g32", "awq"), ("W4A4", "smoothquant"))
JOURNAL = RESULTS / "qat_recovery_jobs.json"


class Journal:
    """Results of all jobs, written to disk after each."""

    def __init__(self, path: Path, size: Size, base: Path, jobs: int) -> None:
        self.path, self.size, self.base, self.workers = path, size, base, jobs
        dense = evaluate(base_model(size, base), size)
        self.content: dict[str, Any] = {"dense": dense, "mixed": None, "losses": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if abs(self.content["dense"] - dense) > 1e-4:
                raise SystemExit(f"{path} was made from another dense model ({self.content['dense']} and not {dense})")

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that are not finished, the longest first."""
        todo = [job for job in dict.fromkeys(jobs) if _key(job) not in self.content["losses"]]
        layers = None
        if any(job.format == "mixed" for job in todo):
            layers, self.content["mixed"] = mixed_layers(self.size, self.base)
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            futures = {
                pool.submit(do, job, self.size, self.base, layers if job.format == "mixed" else None): job
                for job in todo
            }
            for count, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                if future.exception() is not None:  # what is not begun would otherwise be done, and be lost
                    pool.shutdown(wait=False, cancel_futures=True)
                self.content["losses"][_key(job)] = future.result()
                self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
                print(f"{count}/{len(todo)} {_key(job)}: {future.result():.4f}", flush=True)

    def loss(self, job: Job) -> float:
        """The result of a job."""
        return float(self.content["losses"][_key(job)])

    def best(self, form: str, method: str) -> Job:
        """The job with the learning rate of the least loss at the first seed."""
        return min((Job(form, method, lr) for lr in RATES), key=self.loss)

    def seeds(self, form: str, method: str) -> list[float]:
        """Losses of a row over the finished seeds."""
        best = self.best(form, method)
        found = [replace(best, seed=seed) for seed in SEEDS]
        return [self.loss(job) for job in found if _key(job) in self.content["losses"]]


def _key(job: Job) -> str:
    parts = [job.format, job.method]
    if job.trains:
        parts += [f"lr {job.lr:g}", f"seed {job.seed}"]
    return " | ".join([*parts, *([job.init] if job.init else [])])


def trained_methods(form: str) -> list[str]:
    """The trained rows of a format."""
    if form == "dense":
        return ["dense trained further", "dense trained further + KD"]
    return [*(["torchao QAT"] if FORMATS[form].torchao else []), "QAT", "QAT + KD"]


def all_jobs(journal: Journal, formats: list[str], headlines: list[str]) -> None:
    """Run everything: untrained rows and the sweep, then seeds and starting points at the best learning rate."""
    rounding = [Job(form, "RTN") for form in formats]
    rounding += [Job(form, "GPTQ") for form in formats if FORMATS[form].scheme.weight is not None]
    rounding += [Job("mixed", "RTN"), Job("W3 g32", "AWQ"), Job("W3 g32", "SmoothQuant")]
    order = ["dense", *headlines, *(form for form in formats if form not in headlines)]
    journal.run([*rounding, *(Job(form, m, lr) for form in order for m in trained_methods(form) for lr in RATES)])
    more = [
        replace(journal.best(form, method), seed=seed)
        for form in ["dense", *headlines]
        for method in trained_methods(form)
        if "KD" in method or method.startswith("dense") or (method == "torchao QAT" and form in AGAINST_TORCHAO)
        for seed in SEEDS[1:]
    ]
    more += [_started(journal, form, init) for form, init in STARTS if form in formats]
    more += [Job("mixed", "QAT + KD", journal.best("W3 g32", "QAT + KD").lr, seed) for seed in SEEDS]
    journal.run(more)


def _started(journal: Journal, form: str, init: str) -> Job:
    """QAT + KD at its best learning rate, from another starting point."""
    return replace(journal.best(form, "QAT + KD"), init=init)  # type: ignore[arg-type]  # each is a Method


def _baseline(journal: Journal) -> float:
    return min(float(journal.content["dense"]), mean(journal.seeds("dense", "dense trained further")))


def rows_of(journal: Journal, formats: list[str]) -> list[dict[str, Any]]:
    """The table: losses, and the fraction of the quantization loss that each row recovers."""
    baseline = _baseline(journal)
    rows = [_row("dense", "-", [journal.content["dense"]], None, baseline)]
    rows += [
        _row("dense", m, journal.seeds("dense", m), None, baseline, journal.best("dense", m))
        for m in trained_methods("dense")
    ]
    for form in formats:
        rounded = journal.loss(Job(form, "RTN"))
        rows.append(_row(form, "RTN", [rounded], rounded, baseline))
        for method in ("GPTQ", "AWQ", "SmoothQuant"):
            if _key(Job(form, method)) in journal.content["losses"]:
                rows.append(_row(form, method, [journal.loss(Job(form, method))], rounded, baseline))
        for method in trained_methods(form):
            rows.append(_row(form, method, journal.seeds(form, method), rounded, baseline, journal.best(form, method)))
        for job in (_started(journal, form, init) for named, init in STARTS if named == form):
            rows.append(_row(form, f"QAT + KD from {job.init}", [journal.loss(job)], rounded, baseline, job))
    rounded = journal.loss(Job("W3 g32", "RTN"))
    mixed = [Job("mixed", "QAT + KD", journal.best("W3 g32", "QAT + KD").lr, seed) for seed in SEEDS]
    rows.append(_row("mixed, bytes of W3 g32", "RTN", [journal.loss(Job("mixed", "RTN"))], rounded, baseline))
    rows.append(
        _row("mixed, bytes of W3 g32", "QAT + KD", [journal.loss(job) for job in mixed], rounded, baseline, mixed[0])
    )
    return rows


def _row(
    form: str, method: str, losses: list[float], rounded: float | None, baseline: float, job: Job | None = None
) -> dict[str, Any]:
    value = mean(losses)
    lost = 0.0 if rounded is None else rounded - baseline
    # where rounding costs next to nothing, a share of it says nothing
    recovered = None if rounded is None or method == "RTN" or lost < 0.002 else (rounded - value) / lost
    return {
        "format": form,
        "method": method,
        "held-out loss": f"{value:.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""),
        "difference from baseline": f"{value - baseline:+.4f}" + (f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""),
        "recovered": "-" if recovered is None else f"{recovered * 100:.1f}%",
        "lr": f"{job.lr:g}" if job else "-",
        "seeds": len(losses),
    }


def claims_of(journal: Journal, formats: list[str]) -> list[Claim]:
    """Targets of the project and measured values."""
    on, baseline = journal.seeds("dense", "dense trained further"), _baseline(journal)

    def recovered(form: str, losses: list[float]) -> float:
        rounded = journal.loss(Job(form, "RTN"))
        return (rounded - mean(losses)) / (rounded - baseline)

    claims = []
    for form in ("W4 channel", "W3 g32"):
        losses = journal.seeds(form, "QAT + KD")
        spread = max(stdev(losses), stdev(on))
        seen = f"{mean(losses):.4f} and {baseline:.4f}, spread {spread:.4f}"
        holds = mean(losses) <= baseline - spread
        claims.append(Claim(f"{form}: loss of QAT + KD", "below the baseline by at least the spread", seen, holds))
    for form, target in (("W2 g32", 0.93), ("ternary", 0.85), ("W4A8", 0.97), ("W4A4", 0.85), ("W4A4 g32", 0.85)):
        share = recovered(form, journal.seeds(form, "QAT + KD"))
        claims.append(
            Claim(f"{form}: loss recovered by QAT + KD", f">= {target:.0%}", f"{share * 100:.1f}%", share >= target)
        )
    for form in formats:
        if FORMATS[form].scheme.weight is not None:
            ours, theirs = mean(journal.seeds(form, "QAT + KD")), journal.loss(Job(form, "GPTQ"))
            claims.append(
                Claim(
                    f"{form}: QAT + KD compared with GPTQ", "lower loss", f"{ours:.4f} and {theirs:.4f}", ours < theirs
                )
            )
    for form in AGAINST_TORCHAO:
        ours, theirs = (recovered(form, journal.seeds(form, m)) for m in ("QAT + KD", "torchao QAT"))
        seen = f"{ours * 100:.1f}% and {theirs * 100:.1f}%"
        claims.append(Claim(f"{form}: QAT + KD compared with torchao QAT", "+10 points", seen, ours - theirs >= 0.1))
    mixed = mean(journal.loss(Job("mixed", "QAT + KD", journal.best("W3 g32", "QAT + KD").lr, seed)) for seed in SEEDS)
    uniform = mean(journal.seeds("W3 g32", "QAT + KD"))
    seen = f"{mixed:.4f} and {uniform:.4f}; {journal.content['mixed']}"
    claims.append(
        Claim("mixed compared with uniform W3 g32, QAT + KD", "lower loss at equal bytes", seen, mixed < uniform)
    )
    return claims


def main(quick: bool, jobs: int) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "jobs.json", QUICK, Path(folder) / "base.safetensors", jobs)
            formats = ["W3 g32", "W2 g32"]
            all_jobs(journal, formats, formats)
            for row in rows_of(journal, formats):
                print(" | ".join(map(str, row.values())))
        return
    journal = Journal(JOURNAL, FULL, BASE, jobs)
    all_jobs(journal, list(FORMATS), list(HEADLINES))
    finish("qat_recovery", rows_of(journal, list(FORMATS)), claims_of(journal, list(FORMATS)), SEEDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.quick, arguments.jobs)
