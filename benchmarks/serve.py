"""Serve models in ONNX Runtime and OpenVINO: qatkit's files beside fp32 and ONNX Runtime's own quantization.

Run: python benchmarks/serve.py [--only FAMILY] [--quick]
Takes about an hour on two cores, which must be idle.

Each family is trained on scikit-learn's digits. Then four files are served: fp32; `quantize_static` (QDQ, per channel,
calibrated on the same images) and `quantize_dynamic`, both without training; and qatkit's, trained with a target and
distilled from the dense model. Sessions of ONNX Runtime have default options; OpenVINO computes in float32 instead of
bfloat16, its default on processors with AMX. Latencies are interleaved; a ratio is the median over rounds, with a
bootstrap interval of 95 %.
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
import openvino
import torch
from harness import RESULTS, Claim, finish
from serve_files import FILES, samples, write
from serve_models import FAMILIES
from torch import Tensor, nn

from qatkit.quantization import strip_qat
from qatkit.report.bench import in_random_order
from qatkit.report.serving import speedup

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


def in_onnxruntime(path: Path, threads: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """A file with one input, in a default session of ONNX Runtime."""
    session = open_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]  # type: ignore[no-any-return]


def in_openvino(path: Path, threads: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """The same file in OpenVINO on the CPU."""
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda x: request.infer([x])[0]  # type: ignore[no-any-return]


RUNTIMES = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}


def seconds(calls: dict[str, Any], x: np.ndarray[Any, Any], rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """Latencies of interleaved calls by file, after a tenth of the rounds to warm up."""

    def timer(call: Callable[[np.ndarray[Any, Any]], object]) -> Callable[[], float]:
        def timed() -> float:
            began = time.perf_counter()
            call(x)
            return time.perf_counter() - began

        return timed

    timers = {name: timer(call) for name, call in calls.items()}
    in_random_order(timers, max(2, rounds // 10))
    return {name: np.array(values) for name, values in in_random_order(timers, rounds).items()}


@torch.no_grad()
def outputs(call: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], x: Tensor) -> Tensor:
    """What a file computes."""
    return torch.from_numpy(np.concatenate([np.array(call(part.numpy())) for part in x.split(64)]))


@torch.no_grad()
def deviation(model: nn.Module, found: Tensor, x: Tensor) -> float:
    """The file's mean deviation from the trained model in float64, as a fraction of the quantization error."""
    floating = copy.deepcopy(model)
    strip_qat(floating)
    exact = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    return float((found - exact).abs().mean() / (model(x) - floating(x)).abs().mean())


def loaded(path: Path, threads: int, runtime: str) -> Any:
    """A file in a runtime; None if the runtime does not know its operators."""
    try:
        return RUNTIMES[runtime](path, threads)
    except Exception as error:  # OpenVINO's errors share no base class
        print(f"{runtime} does not load {path.name}: {str(error).strip().splitlines()[-1][:200]}", flush=True)
        return None


def measure(name: str, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a family, and the figures that the claims read."""
    x, labels = samples(FAMILIES[name])[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write(name, folder, quick)
        paths = {kind: folder / f"{kind}.onnx" for kind in FILES}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        chosen = {kind: kernels(path, folder) for kind, path in paths.items()}
        rows, figures = [], {}
        for runtime in RUNTIMES:
            timed: dict[str, dict[str, Any]] = {}
            for threads in (1, 2):
                calls = {kind: loaded(path, threads, runtime) for kind, path in paths.items()}
                calls = {kind: call for kind, call in calls.items() if call is not None}
                for batch, count in ROUNDS.items():
                    key = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
                    timed[key] = seconds(calls, x[torch.arange(batch) % len(x)].numpy(), 3 if quick else count)
            found = {kind: outputs(call, x) for kind, call in calls.items()}
            right = {kind: (logits.argmax(1) == labels).numpy() for kind, logits in found.items()}
            for kind in FILES:
                cells: dict[str, Any] = {
                    "model": name, "runtime": runtime, "file": kind,
                    "accuracy": f"{100 * right[kind].mean():.2f} %" if kind in right else "not loaded",
                    "kB": round(sizes[kind] / 1000, 1),
                    "integer kernels": chosen[kind][1] if runtime == "ONNX Runtime" else "-",
                }  # fmt: skip
                for key, times in timed.items():
                    ratio = f"{speedup(times['fp32'], times[kind]).median:.2f}" if kind in times else "-"
                    cells[f"x fp32, {key}"] = ratio
                rows.append(cells)
            figures[runtime] = _figures(timed, right) | {"deviation": deviation(model, found["qatkit"], x)}
    figures["size"] = sizes["qatkit"] / min(sizes["static"], sizes["dynamic"])
    figures["float kernels"] = {kind: count for kind, count in chosen["qatkit"][0].items() if kind in FLOAT}
    return rows, figures


def _figures(timed: dict[str, dict[str, Any]], right: dict[str, Any]) -> dict[str, Any]:
    """Speeds and accuracy relative to the faster and to the static PTQ file, in one runtime."""
    free = {
        key: min({"static", "dynamic"} & times.keys(), key=lambda kind: float(np.median(times[kind])))
        for key, times in timed.items()
    }
    return {
        "to the better free file": {
            key: astuple(speedup(times[free[key]], times["qatkit"])) for key, times in timed.items()
        },
        "fp32": {key: speedup(times["fp32"], times["qatkit"]).median for key, times in timed.items()},
        "free fp32": {key: speedup(times["fp32"], times[free[key]]).median for key, times in timed.items()},
        "accuracy behind": float(right["static"].mean() - right["qatkit"].mean()),
        "interval": 1.96 * float((right["qatkit"].astype(float) - right["static"]).std() / len(right["static"]) ** 0.5),
    }


def claims_of(figures: dict[str, dict[str, Any]]) -> list[Claim]:
    """The targets of the project, by family and runtime."""
    claims: list[Claim] = []
    for name, each in figures.items():
        family = FAMILIES[name]
        for runtime in RUNTIMES:
            claims += _speed_claims(f"{name} in {runtime}", each[runtime])
            behind, interval = each[runtime]["accuracy behind"], each[runtime]["interval"]
            text = f"{name} in {runtime}: accuracy below that of static PTQ"
            seen = f"{100 * behind:.2f} of {100 * interval:.2f} points"
            claims.append(Claim(text, "<= its interval", seen, behind <= interval))
            limit, seen = f"<= {family.deviation:.0%} of the quantization error", each[runtime]["deviation"]
            text = f"{name} in {runtime}: deviation from float64"
            claims.append(Claim(text, limit, f"{100 * seen:.2g} %", seen <= family.deviation))
        text = f"{name}: size relative to the smaller PTQ file"
        claims.append(Claim(text, "<= 1.02", f"{each['size']:.3f}", each["size"] <= 1.02))
        if family.integer:
            left = ", ".join(f"{count} {kind}" for kind, count in each["float kernels"].items())
            text = f"{name}: products, additions and poolings that run in floating point in ONNX Runtime"
            claims.append(Claim(text, "none", left or "none", not left))
    for runtime in RUNTIMES:
        fast = [
            name
            for name, each in figures.items()
            if min(m for m, _, _ in each[runtime]["to the better free file"].values()) >= 1.0
        ]
        text = f"models in {runtime} whose medians are at least those of the faster PTQ file in every setting"
        claims.append(Claim(text, ">= half", f"{len(fast)} of {len(figures)}", 2 * len(fast) >= len(figures)))
    return claims


def _speed_claims(name: str, figures: dict[str, Any]) -> list[Claim]:
    lows = [low for _, low, _ in figures["to the better free file"].values()]
    medians = [middle for middle, _, _ in figures["to the better free file"].values()]
    slower = [key for key, value in figures["fp32"].items() if value < 1 <= figures["free fp32"][key]]
    return [
        Claim(
            f"{name}: speed relative to the faster PTQ file, lower end of the 95% interval",
            ">= 0.97",
            f"{min(lows):.2f} (medians {min(medians):.2f} to {max(medians):.2f})",
            min(lows) >= 0.97,
        ),
        Claim(
            f"{name}: settings in which it is slower than fp32 and a PTQ file is not",
            "none",
            ", ".join(slower) or "none",
            not slower,
        ),
    ]


def main(only: str | None, quick: bool) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    path = RESULTS / "serve.json"
    stored = json.loads(path.read_text())["parts"] if only and path.exists() and not quick else {}
    for name, (_, figures) in stored.items():
        if not RUNTIMES.keys() <= figures.keys():
            raise SystemExit(f"{path}: '{name}' was not measured in every runtime; run all families without --only")
    for name in FAMILIES:
        if only in (None, name):
            stored[name] = measure(name, quick)
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
