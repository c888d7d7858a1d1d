"""Write the log of a recipe beside it: the final table of its run, its validation results, and versions.

Run: python benchmarks/recipe_logs.py NAME [NAME ...]        such as llm/int4_qat; --all for every recipe below
The header of a recipe states its duration. Runs are stored in ``build/recipe_logs``, and a stopped run resumes there.
The logs of the distillation recipes come from `distill_recipes.py`, which measures them over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.report.metrics import metric_of
from qatkit.report.tables import comparison, headers, split_note
from qatkit.run.folder import Run

RECIPES = Path(__file__).parent.parent / "recipes"
LOGGED = (
    "vision/digits_magnitude90", "vision/digits_lottery",
    "llm/qlora", "llm/int4_qat", "llm/int4_qat_lora", "llm/sparse24", "llm/shrink", "llm/qlora_merge_int4",
    "llm/sparse24_kd_int4",
)  # fmt: skip


def values_of(name: str) -> str:
    """A hash of the values in the recipe's file without comments; it identifies the recipe of a log."""
    values = OmegaConf.to_container(OmegaConf.load(RECIPES / f"{name}.yaml"))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def finished(name: str, folder: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Run a recipe as `qatkit run` does, and return its report."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run = Run(load_recipe(name, ["trainer.accelerator=cpu", *overrides]), folder)
    run_stages(run)
    export_run(run)
    verify_run(run)
    return report_run(run)


def log(name: str, report: dict[str, Any]) -> str:
    """The log as Markdown."""
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    metric = metric_of(report)
    lines = [
        f"# {name}",
        "",
        f"Written by `python benchmarks/recipe_logs.py {name}` without overrides.",
        "",
        *_table(headers(report), comparison(report)),
        "",
        f"{split_note(report)} Size is that of the file on disk.",
        "",
        *(f"- {row['stage']}: {row['verification']['text']}" for row in report["rows"]),
        "",
        "## Training",
        "",
        *_table(["stage", "step", f"validation {metric.name}"], _validations(report)),
        "",
        f"{report['machine']['cpus']} CPU cores; {versions}; recipe {values_of(name)}.",
    ]
    return "\n".join(lines) + "\n"


def _validations(report: dict[str, Any]) -> Iterator[list[str]]:
    """One row per validation of every stage; the last is that of the stage's result."""
    metric = metric_of(report)
    name = f"val/{metric.name}"
    for stage in report["stages"]:
        curve = stage["curves"]["metrics"].get(name, {"steps": [], "values": []})
        seen = {step + 1: value for step, value in zip(curve["steps"], curve["values"], strict=True)}
        for step, value in (seen | {stage["steps"]: stage["metrics"][name]}).items():
            yield [stage["stage"], f"{step} of {stage['steps']}", metric.show(value)]


def _table(headers: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    for wanted in LOGGED if arguments.all else arguments.names:
        content = finished(wanted, Path("build/recipe_logs") / wanted)
        (RECIPES / f"{wanted}.md").write_text(log(wanted, content))
        print(f"written: recipes/{wanted}.md", flush=True)
