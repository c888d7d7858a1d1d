"""Run the digits recipes over five seeds: accuracy, size, speed and parity of dense, PTQ and trained models.

Run: python benchmarks/digits.py
Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from harness import Claim, finish, spread

from qatkit.export.onnx.runtime import integer_kernels
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run

CNN = ("digits_int8", "digits_int4", "digits_int2")
"""They start with the same dense stage, so it is trained once."""
RECIPES = ("digits_resnet", *CNN)
METHODS = {"dense": "dense", "post-training": "PTQ", "trained": "QAT"}
"""Names in the table, by the kind of a row of the report."""


def main(seeds: list[int]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in RECIPES}
    kernels: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for name in RECIPES:
                run = Run(load_recipe(f"vision/{name}", [f"seed={seed}"]), Path(folder) / f"{name}-{seed}")
                if name in CNN[1:]:
                    shutil.copytree(Path(folder) / f"{CNN[0]}-{seed}" / "stages" / "dense", run.folder("dense"))
                run_stages(run)
                export_run(run)
                verify_run(run)
                reports[name].append(report_run(run))
                counted = integer_kernels(exports_of(run)[-1].path)
                kernels[name] = ", ".join(f"{count} {op}" for op, count in (counted.integer | counted.floating).items())
    rows = []
    for name in RECIPES:
        rows += [
            row(name, position, reports[name], kernels[name] if position else "")
            for position in range(3)
            if position or name not in CNN[1:]
        ]
        rows.append(baseline_row(name, reports[name]))
    accuracies = {name: [[r["test_accuracy"] for r in report["rows"]] for report in reports[name]] for name in RECIPES}
    claims = []
    for kind, name in (("residual network", RECIPES[0]), ("CNN", CNN[0])):
        dense_mean = mean(values[0] for values in accuracies[name])
        text = f"dense {kind}, mean test accuracy"
        claims.append(Claim(text, ">= 98.5%", f"{dense_mean * 100:.2f}%", dense_mean >= 0.985))
    faster = speeds(reports[RECIPES[0]], lambda report: report["rows"][2])[0]
    claims.append(Claim("digits_resnet: speed relative to fp32, batch 1", ">= 1.5x", f"{faster:.2f}x", faster >= 1.5))
    first, _, last = reports[RECIPES[0]][0]["rows"]
    smaller = first["bytes"] / last["bytes"]
    claims.append(Claim("digits_resnet: size of fp32 / size", ">= 3", f"{smaller:.2f}", smaller >= 3))
    for name in RECIPES:
        dense_mean = mean(values[0] for values in accuracies[name])
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
        "recipe": name if position or name not in CNN else ", ".join(CNN),
        "method": METHODS[rows[0]["kind"]],
        "test accuracy": spread([r["test_accuracy"] for r in rows]),
        "test accuracy in ONNX Runtime": spread([r["verification"]["runtime_metric"] for r in rows]),
        "size, kB": round(rows[0]["bytes"] / 1000, 1),
    }
    cells |= speed_cells(reports, lambda report: report["rows"][position])
    error = max(r["verification"]["mean_error"] / (r["verification"]["quantization_error"] or 1) for r in rows)
    cells["output difference / quantization error"] = f"{error:.1e}" if position else "-"
    cells["kernels"] = kernels
    return cells


def baseline_row(name: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the file that ONNX Runtime quantizes without training."""
    made = [report["baselines"][0] for report in reports]
    return {
        "recipe": name,
        "method": f"`{made[0]['name']}` of ONNX Runtime",
        "test accuracy": "-",
        "test accuracy in ONNX Runtime": spread([each["runtime_metric"] for each in made]),
        "size, kB": round(made[0]["bytes"] / 1000, 1),
        **speed_cells(reports, lambda report: report["baselines"][0]),
        "output difference / quantization error": "-",
        "kernels": ", ".join(
            f"{count} {op}" for kind in ("integer", "floating") for op, count in made[0]["kernels"][kind].items()
        ),
    }


def speed_cells(reports: list[dict[str, Any]], of: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, str]:
    """Median speed over all seeds, relative to fp32 ONNX in the same process, by batch size."""
    sizes = [latency["batch_size"] for latency in reports[0]["rows"][0]["latency"]]
    return {f"speed, batch {size}": f"{ratio:.2f}x" for size, ratio in zip(sizes, speeds(reports, of), strict=True)}


def speeds(reports: list[dict[str, Any]], of: Callable[[dict[str, Any]], dict[str, Any]]) -> list[float]:
    """Median speed of a file over all seeds, relative to fp32 ONNX, for each batch size."""
    ratios = [
        [
            then["median_ms"] / now["median_ms"]
            for then, now in zip(report["rows"][0]["latency"], of(report)["latency"], strict=True)
        ]
        for report in reports
    ]
    return [median(each) for each in zip(*ratios, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    main(parser.parse_args().seeds)
