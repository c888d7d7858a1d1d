"""Measure the embeddings of a compressed sentence encoder against those of the float model.

The model is all-MiniLM-L6-v2, from a package of the package index. The sentences are docstrings of the standard library
and of qatkit's dependencies, and the topics of Python's help; whole documents are held out. Every linear layer is
quantized and the embedding tables are not, or every second layer is removed. The float model is the only teacher: no
label is used. Each format tries learning rates and losses on other documents, with another seed and in fewer steps (the
rows "tuning"); the best one by mean cosine similarity trains the models of the reported seeds. Results of jobs are
stored in ``results/encoder_jobs.json``, and a stopped benchmark resumes there.

Run: python benchmarks/encoder.py [--quick] [--jobs 2]
The full mode takes about two hours of one core; --quick tests the mechanics on a tiny model with random weights, needs
no network and writes no results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness import RESULTS, Claim, finish
from minilm import DEPTH, FORMATS, FULL, QUICK, TRIED, TUNING_SEED, Job, Size, do, source_of

SEEDS = (0, 1, 2)
TARGETS = {"W8A8 static": 0.997, "W4 g128": 0.985, "W3 g32": 0.97, "W2 g32": 0.93, DEPTH: 0.95}
"""Mean cosine similarity to the float model after training."""
METRICS = {"cosine": "mean cosine", "spearman": "Spearman of pair similarities", "nearest": "same nearest neighbor"}
JOURNAL = RESULTS / "encoder_jobs.json"


class Journal:
    """Scores of all jobs, written to disk after each.

    Raises:
        SystemExit: the file was made from another model or from other sentences.
    """

    def __init__(self, path: Path, size: Size) -> None:
        self.path, self.size = path, size
        self.content: dict[str, Any] = {"source": source_of(size), "scores": {}}
        if path.exists():
            source = self.content["source"]
            self.content = json.loads(path.read_text())
            if self.content["source"] != source:
                raise SystemExit(
                    f"{path} was made from {self.content['source']} and not from {source}; delete it to start again"
                )

    def run(self, jobs: Iterable[Job], workers: int) -> None:
        """Run the jobs that are not finished."""
        todo = [job for job in jobs if job not in self]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(do, job, self.size): job for job in todo}
            for count, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                if future.exception() is not None:  # jobs that have not begun would run, and their scores be lost
                    pool.shutdown(wait=False, cancel_futures=True)
                self.content["scores"][str(job)] = future.result()
                self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
                print(f"{count}/{len(todo)} {job}: {future.result()}", flush=True)

    def __contains__(self, job: Job) -> bool:
        return str(job) in self.content["scores"]

    def scores(self, jobs: Iterable[Job], metric: str) -> list[float]:
        """One metric of the finished jobs."""
        return [float(self.content["scores"][str(job)][metric]) for job in jobs if job in self]


def untrained_jobs(form: str) -> list[Job]:
    """The rows of a format without training."""
    if form == DEPTH:
        return [Job(DEPTH, "-")]
    return [Job(form, method) for method in ("rtn", "gptq")]


def tuning_jobs(form: str) -> list[Job]:
    """One job per training that is tried."""
    return [Job(form, _trained(form), TUNING_SEED, training, "tuning") for training in TRIED[form]]


def trained_jobs(form: str, journal: Journal) -> list[Job]:
    """One job per seed, trained in the best way that was tried."""
    tried = [job for job in tuning_jobs(form) if job in journal]
    if not tried:
        return []
    best = max(tried, key=lambda job: journal.scores([job], "cosine"))
    return [replace(best, seed=seed, split="held-out") for seed in SEEDS]


def _trained(form: str) -> str:
    return "KD" if form == DEPTH else "QAT + KD"


def run_all(journal: Journal, workers: int) -> None:
    """Run everything: untrained rows, what is tried, and the seeds, one seed of every format after the other."""
    untrained = [job for form in (*FORMATS, DEPTH) for job in untrained_jobs(form)]
    journal.run([*untrained, *(job for form in TARGETS for job in tuning_jobs(form))], workers)
    trained = [trained_jobs(form, journal) for form in TARGETS]
    journal.run([jobs[index] for index in range(len(SEEDS)) for jobs in trained], workers)


def rows_of(journal: Journal) -> list[dict[str, Any]]:
    """The table: held-out sentences, then what was tried on the documents for tuning."""
    jobs: list[list[Job]] = []
    for form in (*FORMATS, DEPTH):
        jobs += [[job] for job in untrained_jobs(form)]
        jobs += [trained_jobs(form, journal)] if form in TARGETS else []
    jobs += [[job] for form in TARGETS for job in tuning_jobs(form)]
    return [_row(journal, same) for same in jobs if any(job in journal for job in same)]


def _row(journal: Journal, jobs: list[Job]) -> dict[str, Any]:
    job = jobs[0]
    found = {words: journal.scores(jobs, metric) for metric, words in METRICS.items()}
    return {
        "format": job.format,
        "method": job.method,
        "sentences": job.split,
        "training": str(job.training or "-"),
        **{words: _spread(values) for words, values in found.items()},
        "seeds": len(found[METRICS["cosine"]]),
    }


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def claims_of(journal: Journal) -> list[Claim]:
    """Targets of the project and measured values."""
    claims = []
    for form, target in TARGETS.items():
        values = journal.scores(trained_jobs(form, journal), "cosine")
        holds = bool(values) and mean(values) >= target
        claims.append(Claim(f"{form}: mean cosine after training", f">= {target}", _spread(values), holds))
    return claims


def main(quick: bool, workers: int) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "jobs.json", QUICK)
            run_all(journal, workers)
            for row in rows_of(journal):
                print(" | ".join(map(str, row.values())))
        sys.exit()
    journal = Journal(JOURNAL, FULL)
    run_all(journal, workers)
    finish("encoder", rows_of(journal), claims_of(journal), SEEDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    main(arguments.quick, arguments.jobs)
