"""Run the digits recipes over five seeds: accuracy, size, speed and parity of dense, PTQ and trained models.

Run: python benchmarks/digits.py
Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from harness import Claim, finish, spread

from qatkit.export.runtime import integer_kernels
from qatkit.pipeline.export import export_run, exported_path
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run

RECIPES = ("digits_int8", "digits_int4", "digits_int2")
METHODS = {"dense": "dense", "post-training": "PTQ", "trained": "QAT"}
"""Names in the table, by the kind of a row of the report."""


def main(seeds: list[int]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    kernels: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            dense: Path | None = None
            for name in RECIPES:
                run = Run(load_recipe(f"vision/{name}", [f"seed={seed}"]), Path(folder) / f"{name}-{seed}")
                if dense is not None:  # all recipes start with the same dense stage, so it is trained once
                    shutil.copytree(dense, run.folder("dense"))
                run_stages(run)
                dense = run.folder("dense")
                export_run(run)
                verify_run(run)
                reports[name].append(report_run(run))
                counted = integer_kernels(exported_path(run, "qat"))
                kernels[name] = ", ".join(f"{count} {op}" for op, count in (counted.integer | counted.floating).items())
    rows = [
        row(name, position, reports[name], kernels[name] if position else "")
        for name in RECIPES
        for position in range(3)
        if position or name == RECIPES[0]
    ]
    accuracies = {name: [[r["test_accuracy"] for r in report["rows"]] for report in reports[name]] for name in RECIPES}
    dense_mean = mean(values[0] for values in accuracies[RECIPES[0]])
    claims = [
        Claim("dense CNN, mean test accuracy", ">= 98.5%", f"{dense_mean * 100:.2f}%", dense_mean >= 0.985),
    ]
    for name in RECIPES:
        lost, gap = (dense_mean - mean(values[position] for values in accuracies[name]) for position in (1, 2))
        if name == "digits_int2":  # here rounding loses so much that winning it back is the measure
            share = 1 - gap / lost
            text = "digits_int2: fraction of the accuracy lost by PTQ that QAT recovers"
            claims.append(Claim(text, ">= 85%", f"{share * 100:.1f}%", share >= 0.85))
            continue
        claims.append(
            Claim(f"{name}: mean accuracy, dense minus QAT", "<= 0.5 points", f"{gap * 100:.2f} points", gap <= 0.005)
        )
    checks = [r["verification"]["passed"] for name in RECIPES for report in reports[name] for r in report["rows"]]
    claims.append(Claim("exported files that pass verification", "all", f"{sum(checks)} of {len(checks)}", all(checks)))
    finish("digits", rows, claims, seeds)


def row(name: str, position: int, reports: list[dict[str, Any]], kernels: str) -> dict[str, Any]:
    """One row of the table: a stage over all seeds, with the median speed relative to fp32 ONNX in the same process."""
    rows = [report["rows"][position] for report in reports]
    cells: dict[str, Any] = {
        "recipe": name if position else "all",
        "method": METHODS[rows[0]["kind"]],
        "test accuracy": spread([r["test_accuracy"] for r in rows]),
        "test accuracy in ONNX Runtime": spread([r["verification"]["runtime_metric"] for r in rows]),
        "size, kB": round(rows[0]["bytes"] / 1000, 1),
    }
    for index, latency in enumerate(rows[0]["latency"]):
        ratios = [
            report["rows"][0]["latency"][index]["median_ms"] / report["rows"][position]["latency"][index]["median_ms"]
            for report in reports
        ]
        cells[f"speed, batch {latency['batch_size']}"] = f"{median(ratios):.2f}x"
    error = max(r["verification"]["mean_error"] / (r["verification"]["quantization_error"] or 1) for r in rows)
    cells["output difference / quantization error"] = f"{error:.1e}" if position else "-"
    cells["kernels"] = kernels
    return cells


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    main(parser.parse_args().seeds)
