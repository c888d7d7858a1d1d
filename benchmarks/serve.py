"""Serve models in ONNX Runtime: qatkit's files beside fp32 and ONNX Runtime's own post-training quantization.

Run: python benchmarks/serve.py [--only FAMILY] [--quick]
Takes about fifteen minutes on two cores, which must be idle.

Each family is trained on scikit-learn's digits at 32x32 pixels. Then four files are served in default sessions:
fp32; `quantize_static` (QDQ, per channel, calibrated on the same images) and `quantize_dynamic`, both without
training; and qatkit's, trained with ``target="onnxruntime"`` and distilled from the dense model. Latencies are
interleaved; a ratio is the median over rounds, with a bootstrap interval of 95 %.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from harness import RESULTS, Claim, finish
from lightning.pytorch import LightningModule, Trainer, seed_everything
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from serve_models import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QuantSpec
from qatkit.data import digits
from qatkit.export.onnx import export_onnx
from qatkit.export.onnx_baselines import quantize as quantize_free
from qatkit.quantization import strip_qat
from qatkit.report.bench import in_random_order
from qatkit.report.serving import speedup

FILES = ("fp32", "static", "dynamic", "qatkit")
FLOAT = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "Add",
    "Concat",
    "GlobalAveragePool",
    "ReduceMean",
}
INTEGER = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "ConvInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QLinearGlobalAveragePool",
}
ROUNDS = {1: 200, 64: 12}
"""Interleaved rounds by batch size."""


class Classifier(LightningModule):
    """A classifier that is trained with Adam."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def train(model: nn.Module, steps: int, lr: float, callbacks: list[Any]) -> None:
    """Train a model on the digits."""
    seed_everything(0)
    data = digits(size=32, val_fraction=0.1, test_fraction=0.3, batch_size=64)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Classifier(model, lr), data)
    model.eval()


def write(name: str, folder: Path, steps: int, images: Tensor) -> nn.Module:
    """Train a family, write its four files, and return the trained model."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    train(model, 4 * steps, 3e-3, [])
    dense = copy.deepcopy(model)
    paths = {kind: folder / f"{kind}.onnx" for kind in FILES}
    export_onnx(dense, images[:2], paths["fp32"])
    for kind in ("static", "dynamic"):
        quantize_free(f"quantize_{kind}", paths["fp32"], images[:256].split(64), paths[kind])
    quantize = QuantizationAwareTraining(target="onnxruntime", weight=QuantSpec(7, observer="lsq"))
    distill = KnowledgeDistillation(dense, temperature=2.0, alpha=0.9, student="model")
    train(model, steps, 1e-3, [quantize, distill])
    export_onnx(model, images[:2], paths["qatkit"])
    return model


def open_session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """A default session; the options below change no result."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kernels(path: Path, folder: Path) -> tuple[Counter[str], str]:
    """The kernels that ONNX Runtime chose, and those of products, additions and poolings as text."""
    open_session(path, 1, folder / "optimized.onnx")
    counts = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    integer, floating = (sum(counts[kind] for kind in kinds) for kinds in (INTEGER, FLOAT))
    return counts, f"{integer} of {integer + floating}"


def input_of(session: Any) -> str:
    """The name of a file's only input."""
    name: str = session.get_inputs()[0].name
    return name


def seconds(sessions: dict[str, Any], batch: int, rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """Latencies of interleaved calls by file, after a tenth of the rounds to warm up."""
    x = np.random.default_rng(0).random((batch, 1, 32, 32), dtype=np.float32)

    def timer(session: Any) -> Callable[[], float]:
        feed = {input_of(session): x}

        def timed() -> float:
            began = time.perf_counter()
            session.run(None, feed)
            return time.perf_counter() - began

        return timed

    timers = {name: timer(session) for name, session in sessions.items()}
    in_random_order(timers, rounds // 10)
    return {name: np.array(values) for name, values in in_random_order(timers, rounds).items()}


@torch.no_grad()
def outputs(session: Any, x: Tensor) -> Tensor:
    """What a file computes."""
    name = input_of(session)
    return torch.from_numpy(np.concatenate([session.run(None, {name: part.numpy()})[0] for part in x.split(64)]))


@torch.no_grad()
def deviation(model: nn.Module, found: Tensor, x: Tensor) -> float:
    """The file's mean deviation from the trained model in float64, as a fraction of the quantization error."""
    floating = copy.deepcopy(model)
    strip_qat(floating)
    exact = copy.deepcopy(model).double()(x.double())
    return float((found - exact).abs().mean() / (model(x) - floating(x)).abs().mean())


def measure(name: str, steps: int, rounds: dict[int, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a family, and the figures that the claims read."""
    data = digits(size=32, val_fraction=0.1, test_fraction=0.3)
    images, test = data.train.tensors[0], data.test.tensors  # type: ignore[union-attr]  # tensor data sets
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write(name, folder, steps, images)
        paths = {kind: folder / f"{kind}.onnx" for kind in FILES}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        chosen = {kind: kernels(path, folder) for kind, path in paths.items()}
        timed: dict[tuple[int, int], dict[str, Any]] = {}
        for threads in (1, 2):
            sessions = {kind: open_session(path, threads) for kind, path in paths.items()}
            for batch, count in rounds.items():
                timed[threads, batch] = seconds(sessions, batch, count)
        found = {kind: outputs(open_session(path, 1), test[0]) for kind, path in paths.items()}
    right = {kind: (logits.argmax(1) == test[1]).numpy() for kind, logits in found.items()}
    rows = []
    for kind in FILES:
        cells: dict[str, Any] = {
            "model": name, "file": kind, "accuracy": f"{100 * right[kind].mean():.2f} %",
            "kB": round(sizes[kind] / 1000, 1), "integer kernels": chosen[kind][1],
        }  # fmt: skip
        for (threads, batch), times in timed.items():
            key = f"x fp32, batch {batch}, {threads} thread{'s' * (threads > 1)}"
            cells[key] = f"{speedup(times['fp32'], times[kind]).median:.2f}"
        rows.append(cells)
    free = {
        key: min(("static", "dynamic"), key=lambda kind: float(np.median(times[kind]))) for key, times in timed.items()
    }
    best = {key: astuple(speedup(times[free[key]], times["qatkit"])) for key, times in timed.items()}
    beyond = 1.96 * float((right["qatkit"].astype(float) - right["static"]).std() / np.sqrt(len(test[1])))
    names = {key: f"batch {key[1]}, {key[0]} thread{'s' * (key[0] > 1)}" for key in timed}
    figures = {
        "to the better free file": {names[key]: best[key] for key in timed},
        "fp32": {names[key]: speedup(times["fp32"], times["qatkit"]).median for key, times in timed.items()},
        "free fp32": {names[key]: speedup(times["fp32"], times[free[key]]).median for key, times in timed.items()},
        "size": sizes["qatkit"] / min(sizes["static"], sizes["dynamic"]),
        "accuracy behind": float(right["static"].mean() - right["qatkit"].mean()),
        "interval": beyond,
        "deviation": deviation(model, found["qatkit"], test[0]),
        "float kernels": {kind: count for kind, count in chosen["qatkit"][0].items() if kind in FLOAT},
    }
    return rows, figures


def claims_of(figures: dict[str, dict[str, Any]]) -> list[Claim]:
    """The targets of the project, by family."""
    claims: list[Claim] = []
    for name, each in figures.items():
        lows = [low for _, low, _ in each["to the better free file"].values()]
        medians = [middle for middle, _, _ in each["to the better free file"].values()]
        text = f"{name}: speed relative to the faster PTQ file, lower end of the 95% interval"
        claims.append(
            Claim(
                text,
                ">= 0.97",
                f"{min(lows):.2f} (medians {min(medians):.2f} to {max(medians):.2f})",
                min(lows) >= 0.97,
            )
        )
        slower = [key for key, value in each["fp32"].items() if value < 1 <= each["free fp32"][key]]
        claims.append(
            Claim(
                f"{name}: settings in which it is slower than fp32 and a PTQ file is not",
                "none",
                ", ".join(slower) or "none",
                not slower,
            )
        )
        claims.append(
            Claim(
                f"{name}: size relative to the smaller PTQ file", "<= 1.02", f"{each['size']:.3f}", each["size"] <= 1.02
            )
        )
        behind, interval = each["accuracy behind"], each["interval"]
        claims.append(
            Claim(
                f"{name}: accuracy below that of static PTQ",
                "<= its interval",
                f"{100 * behind:.2f} of {100 * interval:.2f} points",
                behind <= interval,
            )
        )
        claims.append(
            Claim(
                f"{name}: deviation from float64 in a default session",
                "<= 2 % of the quantization error",
                f"{100 * each['deviation']:.2g} %",
                each["deviation"] <= 0.02,
            )
        )
        left = ", ".join(f"{count} {kind}" for kind, count in each["float kernels"].items())
        claims.append(
            Claim(
                f"{name}: products, additions and poolings that run in floating point", "none", left or "none", not left
            )
        )
    fast = [
        name for name, each in figures.items() if min(m for m, _, _ in each["to the better free file"].values()) >= 1.0
    ]
    claims.append(
        Claim(
            "models whose medians are at least those of the faster PTQ file in every setting",
            ">= half",
            f"{len(fast)} of {len(figures)}",
            2 * len(fast) >= len(figures),
        )
    )
    return claims


def main(only: str | None, quick: bool) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = RESULTS / "serve.json"
    stored = json.loads(path.read_text())["parts"] if only and path.exists() and not quick else {}
    for name in FAMILIES:
        if only in (None, name):
            rounds = dict.fromkeys(ROUNDS, 3) if quick else ROUNDS
            stored[name] = measure(name, 10 if quick else 100, rounds)
            print(name, json.dumps(stored[name][1]), flush=True)
    rows = [row for name in FAMILIES if name in stored for row in stored[name][0]]
    claims = claims_of({name: stored[name][1] for name in FAMILIES if name in stored})
    if quick:
        for row in rows:
            print(" | ".join(map(str, row.values())))
        return
    try:
        finish("serve", rows, claims, [0])
    finally:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": stored}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, help="measure one family, and keep the results of the others")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, nothing written")
    arguments = parser.parse_args()
    main(arguments.only, arguments.quick)
