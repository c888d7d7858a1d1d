"""Search the smallest formats of six models, and compare them with post-training quantization and random search.

Run: python benchmarks/search.py [--quick] [--only MODEL]
Takes about half an hour on one idle core. Every measured pair of a model and a seed is stored in
``results/search_jobs.json``, and a stopped benchmark resumes there; delete the file to start again. --quick trains two
models for a few steps, and writes no results.

Each model is trained, and `qatkit.search` looks for the smallest ONNX file whose metric loses at most 1%, with weights
of 8, 4 and 2 bits, narrower or shallower models, and a budget of two full trainings. The file is then run in ONNX
Runtime on the test split, apart from the search. The rivals keep the same rule: a file counts if, judged by the
validation split, another split of the same size would show at most this loss with a probability of 95%.

- Post-training: the exact allocation of the same sensitivity for 16 sizes, with scales of least squared error and with
  GPTQ; and ONNX Runtime's `quantize_static` and `quantize_dynamic`. The smallest file counts, or the dense one.
- Random search at equal cost: four random choices of model and formats are trained with a quarter of the steps, and the
  smallest one within the limit with all steps.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness import RESULTS, Claim, finish, machine
from journal import Journal, digest
from search_models import FAMILIES, Family, dense_module

from qatkit import QatkitError, QuantSpec, Scheme, apply_ptq, prepare_qat, search
from qatkit.export.formats import FORMATS
from qatkit.export.onnx.baselines import quantize
from qatkit.pipeline.baselines import example_of
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.quantization.mixed.sensitivity import measure_sensitivity
from qatkit.tasks import call
from qatkit.trials.bounded import Found
from qatkit.trials.ladder import SHORT, Rung, ladder
from qatkit.trials.module_subject import ModuleSubject, TrainedModule
from qatkit.trials.promise import Promise, compare
from qatkit.trials.sizes import sized
from qatkit.trials.variants import Variant, parse_variants

JOURNAL = RESULTS / "search_jobs.json"
LIMIT, BUDGET, SEEDS = 0.01, 2.0, (0, 1, 2)
TARGET = 0.8
"""The largest size relative to the best post-training file."""
CANDIDATES = {f"int{bits}": Scheme(QuantSpec(num_bits=bits, observer="lsq")) for bits in (8, 4, 2)}
SIZES = 16


class Job:
    """One trained model, and everything that is measured on it."""

    def __init__(self, family: Family, seed: int, quick: bool, folder: Path) -> None:
        self.family, self.seed, self.folder = family, seed, folder
        self.module, self.data = dense_module(family, seed, 60 if quick else family.dense_steps)
        self.steps = 8 if quick else family.steps
        self.include = family.search.get("include", ["*"])
        self.subject = self.subject_in("rivals")
        self.sensitivity = self.measured(Variant())
        plain = self.subject.plain(Variant())
        types = {name: type(layer).__name__ for name, layer in plain.named_modules()}
        self.in_files = sized(self.sensitivity, types.__getitem__, partial(self.subject.size, plain))
        self.dense = self.subject.dense()

    def subject_in(self, name: str) -> ModuleSubject:
        """The subject of another search, with its own folder."""
        return ModuleSubject(
            self.module, self.data, "onnx", self.folder / name, self.steps, True, None, "net", self.include, (),
            {"accelerator": "cpu"}, self.seed,
        )  # fmt: skip

    def measured(self, variant: Variant) -> Sensitivity:
        """The sensitivity of the whole model or of a smaller one."""
        model = self.subject.plain(variant)
        return measure_sensitivity(model, CANDIDATES, self.subject.loss(), **self.subject.select())

    def searched(self) -> Found:
        """The result of the search."""
        return search(
            self.module, self.data, LIMIT, "onnx", candidates=CANDIDATES, steps=self.steps, budget=BUDGET, model="net",
            trainer={"accelerator": "cpu"}, seed=self.seed, out=self.folder / "search", quiet=True,
            **self.family.search,
        )  # fmt: skip

    def judged(self, model: Callable[..., Any], split: Any = "validation") -> Promise:
        """A model beside the dense one."""
        return compare(self.dense.model(), model, self.subject.batches(split), self.subject.task)

    def within(self, model: Callable[..., Any]) -> bool:
        """Whether the validation split shows that a model is within the limit."""
        return self.judged(model).bound <= LIMIT + 1e-12

    def runtime(self, path: Path) -> Callable[..., Any]:
        """A file in ONNX Runtime, loaded without qatkit's model."""
        run: Callable[..., Any] = FORMATS["onnx"].call("benchmark", path, 1)
        return run

    def allocated(self, method: str) -> int | None:
        """The smallest file of a post-training method under exact allocation; None if none is within the limit."""
        batches = list(islice(self.data.train_dataloader(), 16))
        for rung in ladder(self.in_files.sensitivity, SIZES, self.in_files.fixed):
            model = self.subject._copy()
            fold_batchnorm(model)
            prepare_qat(model, layers=rung.layers, include=self.include)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # layers that a method leaves to least squares
                apply_ptq(model, method, batches, lambda batch, model=model: call(model, batch))
            if self.within(model.eval()):
                made = TrainedModule(model, self.subject, self.folder / method)
                return FORMATS["onnx"].size(made.file())
        return None

    def of_the_runtime(self, name: str) -> int | None:
        """The file of ONNX Runtime's own function; None if it fails or is not within the limit."""
        batches = (example_of(batch) for batch in islice(self.data.train_dataloader(), 16))
        made = self.folder / f"{name}.onnx"
        try:
            quantize(name, self.dense.file(), batches, made)
        except QatkitError:
            return None
        return made.stat().st_size if self.within(self.runtime(made)) else None

    def randomly(self) -> int | None:
        """The smallest file of a random search with the same budget; None if it finds none."""
        draw, subject, sizes = random.Random(self.seed), self.subject_in("random"), self.family.search
        variants = parse_variants("", sizes.get("depth", ""), sizes.get("width", ""))
        measured = {variant: self.measured(variant) for variant in variants}
        tried: list[tuple[int, Variant, Rung]] = []
        for _ in range(4):
            variant = draw.choice(variants)
            own = measured[variant]
            formats = {group.name: draw.choice(list(group.options)) for group in own.groups}
            rung = Rung(0, 0.0, formats, allocated_layers(own, formats))
            tried.append((subject.size(subject.plain(variant), rung.layers), variant, rung))
        tried.sort(key=lambda each: each[0])
        passed = [each for each in tried if self.within(subject.train(each[1], each[2], SHORT).model())]
        size, variant, rung = passed[0] if passed else tried[-1]
        if self.within(subject.train(variant, rung, 1.0).model()):
            return size
        return passed[1][0] if len(passed) > 1 else None


def measured(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """All figures of one model and seed."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(FAMILIES[name], seed, quick, Path(folder))
        found = job.searched()
        alone = job.judged(job.runtime(Path(found.file)), "test")
        dense = FORMATS["onnx"].size(job.dense.file())
        sizes = {method: job.allocated(method) for method in ("mse", "gptq")}
        sizes |= {each: job.of_the_runtime(each) for each in ("quantize_static", "quantize_dynamic")}
        randomly = job.randomly()
    rival = min((size for size in sizes.values() if size is not None), default=dense)
    best = next((each for each, size in sizes.items() if size == rival), "dense")
    bits = {each: sum(own.format == each for own in found.decisions) for each in CANDIDATES}
    return {
        "model": name,
        "seed": seed,
        "metric": found.promise.metric,
        "dense": alone.dense,
        "test loss": alone.lost,
        "held": not found.failures and alone.lost <= LIMIT + 1e-12,
        "said": found.kept,
        "flipped": alone.flipped,
        "chosen": found.variant,
        "layers of 8, 4, 2 bits": "/".join(map(str, bits.values())),
        "bytes": found.bytes,
        "dense bytes": dense,
        "best post-training": best,
        "of its bytes": found.bytes / rival,
        "of random search's": found.bytes / (randomly or dense),
        "cost": sum(step.share for step in found.steps),
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """The targets of the project."""
    held, announced = sum(row["held"] for row in rows), all(row["held"] == row["said"] for row in rows)
    needed = math.floor(len(rows) * 17 / 18)
    models = dict.fromkeys(row["model"] for row in rows)
    worst = {key: max((geometric(rows, model, key), model) for model in models) for key in _RATIOS}
    cost = max(row["cost"] for row in rows)
    return [
        Claim("promise held on the test split", f">= {needed} of {len(rows)}", f"{held}", held >= needed),
        Claim("every miss is announced by the run", "all", "all" if announced else "NOT ALL", announced),
        Claim(
            "file size relative to the best post-training file, geometric mean of seeds, worst model", f"<= {TARGET}",
            "{:.2f} ({})".format(*worst["of its bytes"]), worst["of its bytes"][0] <= TARGET,
        ),
        Claim("cost in full trainings, worst run", f"<= {BUDGET}", f"{cost:.2f}", cost <= BUDGET + 1e-9),
        Claim(
            "file size relative to random search's at equal cost, worst model", "< 1",
            "{:.2f} ({})".format(*worst["of random search's"]), worst["of random search's"][0] < 1,
        ),
    ]  # fmt: skip


_RATIOS = ("of its bytes", "of random search's")


def geometric(rows: Sequence[dict[str, Any]], model: str, key: str) -> float:
    """The geometric mean over the seeds of a model."""
    return math.exp(mean(math.log(row[key]) for row in rows if row["model"] == model))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two models, few steps")
    parser.add_argument("--only", choices=FAMILIES, help="measure one model, and store its results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.quick:  # proves the mechanics; its numbers are no result
        rows = [measured(name, 0, True) for name in ([arguments.only] if arguments.only else ["MLP", "BERT"])]
        for row in rows:
            print(" | ".join(map(str, row.values())))
        sys.exit(0 if all(row["held"] == row["said"] for row in rows) else 1)
    here = Path(__file__).parent
    code = digest(*(here / name for name in ("search.py", "search_models.py")))
    journal = Journal(JOURNAL, {"machine": machine(), "code": code, "limit": LIMIT, "budget": BUDGET})
    for seed in SEEDS:
        for name in [arguments.only] if arguments.only else FAMILIES:
            if (key := f"{name} {seed}") not in journal.results:
                journal.store(key, measured(name, seed, False))
                print(key, journal.results[key], flush=True)
    if not arguments.only:
        rows = [journal.results[f"{name} {seed}"] for name in FAMILIES for seed in SEEDS]
        finish("search", rows, claims_of(rows), SEEDS)


if __name__ == "__main__":
    main()
