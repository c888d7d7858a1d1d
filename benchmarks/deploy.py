"""Export small models in every format and compare each file with training: codes, outputs and predictions, and size.

Run: python benchmarks/deploy.py [--environments FOLDER] [--only MODEL ...] [--format FORMAT] [--quick]
Takes about 15 minutes on two cores. Runtimes that conflict with qatkit's packages run if FOLDER holds their
environments, such as ``FOLDER/mlx`` made by ``qatkit environment mlx FOLDER/mlx``; otherwise the row says that they did
not run. ``--format`` exports in one format again, and keeps the other rows. ``--quick`` exports two models and
writes no results.

The speed is that of `qatkit bench`: decode for language models with a cache, otherwise one batch of 16, on one thread.

Every model is trained for a few quantized steps on random data, so that codes are trained ones. A format that does not
support a model or a scheme refuses it before training: the table shows the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deploy_models import MODELS, Model
from deploy_speed import speeds
from harness import RESULTS, Claim, finish
from torch import nn

from qatkit import QatkitError, QuantSpec, calibrate, export_model, prepare_qat, scheme
from qatkit.export.formats import FORMATS
from qatkit.export.verification import Verification
from qatkit.quantization import prepare_for_target
from qatkit.tasks import call

STEPS = 5
SPEED = "speed, x fp32"


@dataclass(frozen=True)
class Cell:
    """A scheme in a format."""

    format: str
    scheme: str
    """The name in the table."""
    prepare: Callable[[nn.Module, Any], object]
    """``(model, batch)``: fake-quantize the model in place."""
    target: str | None = None


def named(format: str, *names: str) -> list[Cell]:
    """Schemes of `qatkit.scheme`."""

    def cell(name: str) -> Cell:
        found = scheme(name)
        return Cell(format, name, lambda model, _: prepare_qat(model, found.weight, found.activation))

    return [cell(name) for name in names]


def placed(format: str, *targets: str) -> list[Cell]:
    """The targets of a runtime."""

    def cell(name: str) -> Cell:
        return Cell(format, f"target {name}", lambda model, batch: prepare_for_target(model, name, batch), name)

    return [cell(name) for name in targets]


def groups(
    format: str, bits: int, size: int, target: str | None = None, exclude: Sequence[str] = (), **fields: Any
) -> list[Cell]:
    """Weights in groups."""
    spec = QuantSpec(bits, strategy="group", group_size=size, **fields)
    kind = "" if spec.symmetric else " asymmetric"

    def prepare(model: nn.Module, _: object) -> None:
        names = dict(model.named_modules())
        prepare_qat(model, spec, exclude=[name for name in exclude if name in names])

    return [Cell(format, f"W{bits} g{size}{kind}", prepare, target)]


def channels(format: str, bits: int) -> Cell:
    """Weights with a scale and a zero point per output."""
    spec = QuantSpec(bits, symmetric=False)
    return Cell(format, f"W{bits} per channel asymmetric", lambda model, _: prepare_qat(model, spec))


CELLS: list[Cell] = [
    *placed("onnx", "onnxruntime", "onnxruntime-dynamic"), *groups("onnx", 4, 32),
    *placed("openvino", "openvino"), *groups("openvino", 4, 32),
    *placed("litert", "litert"),
    *placed("executorch", "executorch", "executorch-8da4w"),
    *groups("coreml", 4, 32), channels("coreml", 8),
    *groups("dense", 3, 32), *groups("sparse", 3, 32),
    *named("compressed_tensors", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4A16"),
    *named("gguf", "Q8_0", "Q4_0", "Q4_K", "Q2_K", "TQ2_0"),
    *named("mlx", "MLX4", "MLX3", "MXFP4A16"),
    *groups("onnx_genai", 4, 32, "onnxruntime-int4"),
    *groups("openvino_genai", 4, 32),
    *groups("torchao", 4, 32),
    *groups("gptq", 4, 32, exclude=["lm_head"], scale_dtype="float16"),
    *groups("awq", 4, 32, exclude=["lm_head"], scale_dtype="float16", symmetric=False),
]  # fmt: skip


def trained(model: Model, cell: Cell) -> nn.Module:
    """A quantized copy after a few steps."""
    made = copy.deepcopy(model.dense)
    cell.prepare(made, model.inputs)
    calibrate(made, [model.batches[0]], forward=lambda batch: call(made, batch))
    optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
    made.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.loss(made).backward()
        optimizer.step()
    return made.eval()


def row_of(name: str, model: Model, cell: Cell, folder: Path, python: Path | None) -> dict[str, Any]:
    """One row of the table, with a reason if the format refuses the model or the scheme; the file is in `folder`."""
    row: dict[str, Any] = {"model": name, "format": cell.format, "scheme": cell.scheme}
    empty = dict.fromkeys(("weights", "differences", "mean error", "bound", "same prediction", "x fp32", SPEED), "-")
    form = FORMATS[cell.format]
    try:
        planned = copy.deepcopy(model.dense)
        cell.prepare(planned, model.inputs)
        form.check_model(planned)
        quantized = trained(model, cell)
        path = form.path(folder)
        found = export_model(
            quantized,
            cell.format,
            path,
            model.batches,
            target=cell.target,
            task=model.task,
            python=python,
            tokenizer=model.tokenizer if cell.format.endswith("_genai") else None,
        )
    except QatkitError as error:
        return row | {"runtime": f"refused: {error.problem}"} | empty
    size = form.size(path) / sum(p.numel() * p.element_size() for p in model.dense.parameters())
    runtime = f"not run here ({found.not_run})" if found.not_run else found.runtime.rstrip(",")
    return row | {"runtime": runtime} | _measured(found) | {"x fp32": f"{size:.2f}", SPEED: "-"}


def _measured(found: Verification) -> dict[str, Any]:
    shown = "-" if found.mean_error is None else f"{found.mean_error:.2g}"
    return {
        "weights": found.weights,
        "differences": "; ".join(found.failures) or "none",
        "mean error": shown,
        "bound": "-" if found.allowed_error is None else f"{found.allowed_error:.2g}",
        "same prediction": "-" if found.agreement is None else f"{100 * found.agreement:.2f} %",
    }


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """The targets of the project."""
    ran = [row for row in rows if not str(row["runtime"]).startswith(("refused", "not run"))]
    exact = {FORMATS[row["format"]].runtime.rstrip(",").split(",")[0] for row in ran if row["differences"] == "none"}
    wrong = [row for row in rows if row["differences"] not in ("none", "-")]
    ours = [row for row in ran if row["format"] != "onnx"]  # ONNX Runtime rounds activations in its own order
    same = [float(row["same prediction"].removesuffix(" %")) for row in ours if row["same prediction"] != "-"]
    return [
        Claim("runtimes whose files have no differing code", ">= 8", str(len(exact)), len(exact) >= 8),
        Claim("files that differ from training", "0", str(len(wrong)), not wrong),
        Claim(
            "smallest part of predictions that are the same, except in ONNX Runtime", ">= 99.9 %", f"{min(same):.2f} %",
            min(same) >= 99.9,
        ),
    ]  # fmt: skip


def together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with one row for all schemes of a format that are refused for the same reason."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        refused = row["runtime"].startswith("refused")
        key = (row["model"], row["format"], row["runtime"] if refused else row["scheme"])
        if key in found:
            row = found[key] | {"scheme": f"{found[key]['scheme']}, {row['scheme']}"}
        found[key] = row
    return list(found.values())


def with_kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of earlier runs, with new rows of one format."""
    new = {(row["model"], row["format"]) for row in rows}
    content = json.loads((RESULTS / "deploy.json").read_text())
    kept = [{SPEED: "-"} | row for row in content["rows"] if (row["model"], row["format"]) not in new]
    kept = [{key: row[key] for key in rows[0]} for row in kept]  # in the same order
    models, order = list(MODELS), [cell.format for cell in CELLS]
    return sorted([*kept, *rows], key=lambda row: (models.index(row["model"]), order.index(row["format"])))


def rows_of(name: str, model: Model, form: str, python: Path | None) -> list[dict[str, Any]]:
    """The rows of one model in one format."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {cell: Path(temporary) / str(index) for index, cell in enumerate(CELLS) if cell.format == form}
        rows = [row_of(name, model, cell, folder, python) for cell, folder in folders.items()]
        paths = {
            row["scheme"]: FORMATS[form].path(folder)
            for row, folder in zip(rows, folders.values(), strict=True)
            if not row["runtime"].startswith("refused")
        }
        found = speeds(model, FORMATS[form], paths, Path(temporary) / "dense", python) if paths else {}
    return [row | {SPEED: found.get(row["scheme"], "-")} for row in rows]


def interpreter(form: str, environments: Path | None) -> Path | None:
    """The interpreter of the environment of a format, if there is one."""
    if not FORMATS[form].environment or environments is None:
        return None
    found = environments / ("gptq" if form == "awq" else form) / "bin" / "python"
    return found if found.exists() else None


def main(environments: Path | None, only: list[str] | None, format: str | None, quick: bool) -> None:
    rows = []
    chosen = ("MLP", "Llama") if quick else tuple(MODELS)
    for name in [name for name in chosen if only is None or name in only]:
        model = MODELS[name]()
        for form in dict.fromkeys(cell.format for cell in CELLS if format in (None, cell.format)):
            rows += rows_of(name, model, form, interpreter(form, environments))
        for row in together(rows):
            if row["model"] == name:
                print(" | ".join(map(str, row.values())), flush=True)
    rows = together(rows) if format is None else with_kept(together(rows))
    if not quick and (only is None or format is not None):
        finish("deploy", rows, claims_of(rows), [0])
    for claim in claims_of(rows):
        print(f"{'holds ' if claim.holds else 'FAILS '} {claim.text}: {claim.measured} (target {claim.target})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="the folder with environments of conflicting runtimes")
    parser.add_argument(
        "--only", choices=MODELS, nargs="+", help="export some models; writes results only with --format"
    )
    parser.add_argument("--format", choices=list(FORMATS), help="export in one format, and keep the other rows")
    parser.add_argument("--quick", action="store_true", help="export two models, and write no results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    main(arguments.environments, arguments.only, arguments.format, arguments.quick)
