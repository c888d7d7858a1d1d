"""Parts of `serve.py`: measure the files of a family."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from serve_files import FILES, RUNTIMES
from serve_network import parts, samples, scores, taken
from serve_prepared import Prepared, load
from torch import Tensor

from qatkit.report.bench import Example, in_random_order
from qatkit.report.serving import speedup

FLOAT = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "LSTM",
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
    "DynamicQuantizeLSTM",
    "QLinearGlobalAveragePool",
}
BATCHES = (1, 64)
SECONDS = 6.0
"""Time per runtime, number of threads and batch size, about."""
ROUNDS = (12, 200)
"""The fewest and the most interleaved rounds."""
SLOW = 5.0
"""A file that takes more than this many times as long as the fastest one runs in `ROUNDS_OF_SLOW` rounds only."""
ROUNDS_OF_SLOW = 5
Call = Callable[[Example], np.ndarray[Any, Any]]


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


def in_onnxruntime(path: Path, threads: int) -> Call:
    """A file in a default session of ONNX Runtime."""
    session = open_session(path, threads)
    names = [each.name for each in session.get_inputs()]
    return lambda example: session.run(None, _feeds(example, names))[0]  # type: ignore[no-any-return]


def in_openvino(path: Path, threads: int) -> Call:
    """A file in OpenVINO on the CPU."""
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    request, names = compiled.create_infer_request(), [each.any_name for each in compiled.inputs]
    return lambda example: request.infer(_feeds(example, names))[0]  # type: ignore[no-any-return]


def _feeds(example: Example, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    named = {names[0]: example} if isinstance(example, Tensor) else example
    return {name: tensor.numpy() for name, tensor in named.items()}


LOADERS = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}


def seconds(calls: dict[str, Call], example: Example, quick: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Latencies of interleaved calls by file; calls with the same index belong to the same round."""

    def timer(call: Call) -> Callable[[], float]:
        def timed() -> float:
            began = time.perf_counter()
            call(example)
            return time.perf_counter() - began

        return timed

    timers = {name: timer(call) for name, call in calls.items()}
    warm = {name: min(times[1:]) for name, times in in_random_order(timers, 4).items()}
    fast = {name: timers[name] for name, took in warm.items() if took <= SLOW * min(warm.values())}
    rounds = 3 if quick else int(np.clip(SECONDS / sum(warm[name] for name in fast), *ROUNDS))
    few = rounds if len(fast) == len(timers) else min(rounds, ROUNDS_OF_SLOW)
    times = in_random_order(timers, few)
    for name, rest in in_random_order(fast, rounds - few).items():
        times[name] += rest
    return {name: np.array(values) for name, values in times.items()}


def ratio(slow: np.ndarray[Any, Any], fast: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """How many times faster one file is, with its interval, over the rounds in which both ran."""
    count = min(len(slow), len(fast))
    found = speedup(slow[:count], fast[:count])
    return found.median, found.low, found.high


def outputs(call: Call, example: Example) -> Tensor:
    """What a file computes."""
    return torch.cat([torch.from_numpy(np.array(call(part))) for part in parts(example)])


def size(path: Path) -> int:
    """Bytes of a file and of the weights next to it."""
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.exists())


def loaded(path: Path, threads: int, runtime: str) -> Call | None:
    """A file in a runtime; None if the runtime does not know its operators."""
    try:
        return LOADERS[runtime](path, threads)
    except Exception as error:  # OpenVINO's errors share no base class
        print(f"{runtime} does not load {path.name}: {str(error).strip().splitlines()[-1][:200]}", flush=True)
        return None


def measure(name: str, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a family whose files are in a folder, and the figures that the claims read."""
    began, prepared = time.perf_counter(), load(folder)
    files = {kind: folder / file for kind, file in prepared.paths[RUNTIMES[0]].items()}
    with tempfile.TemporaryDirectory() as temporary:
        chosen = {kind: kernels(path, Path(temporary)) for kind, path in files.items()}
    sizes = {kind: size(path) for kind, path in files.items()}
    rows, figures = [], {}
    for runtime in RUNTIMES:
        added, figures[runtime] = _in_runtime(name, runtime, prepared, folder, quick)
        for row in added:
            row["integer kernels"] = chosen[row["file"]][1] if runtime == RUNTIMES[0] else "-"
        rows += added
    print(f"{name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    figures["size"] = sizes["qatkit"] / min(sizes["static"], sizes["dynamic"])
    figures["float kernels"] = {kind: count for kind, count in chosen["qatkit"][0].items() if kind in FLOAT}
    return rows, figures


def _in_runtime(
    name: str, runtime: str, prepared: Prepared, folder: Path, quick: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    paths = {kind: folder / file for kind, file in prepared.paths[runtime].items()}
    count = samples(prepared.held_out)
    timed: dict[str, dict[str, Any]] = {}
    for threads in (1, 2):
        opened = {kind: loaded(path, threads, runtime) for kind, path in paths.items()}
        calls = {kind: call for kind, call in opened.items() if call is not None}
        for batch in BATCHES:
            key = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            timed[key] = seconds(calls, taken(prepared.held_out, torch.arange(batch) % count), quick)
    found = {kind: outputs(call, prepared.held_out) for kind, call in calls.items()}
    scored = {kind: scores(values, prepared.truth) for kind, values in found.items()}
    rows = []
    for kind in FILES:
        row: dict[str, Any] = {
            "model": name, "runtime": runtime, "file": kind,
            "accuracy or cosine": f"{100 * scored[kind].mean():.2f} %" if kind in scored else "not loaded",
            "kB": round(size(paths[kind]) / 1000, 1), "integer kernels": "-",
        }  # fmt: skip
        for key, times in timed.items():
            row[f"x fp32, {key}"] = f"{ratio(times['fp32'], times[kind])[0]:.2f}" if kind in times else "-"
        rows.append(row)
    deviation = float((found["qatkit"] - prepared.exact[runtime]).abs().mean()) / prepared.error[runtime]
    return rows, _figures(timed, scored) | {"deviation": deviation}


def _figures(timed: dict[str, dict[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
    """Speed relative to the faster PTQ file, and the metric relative to the better one, in one runtime."""
    free = {
        key: min({"static", "dynamic"} & times.keys(), key=lambda kind: float(np.median(times[kind])))
        for key, times in timed.items()
    }
    best = max({"static", "dynamic"} & scores.keys(), key=lambda kind: float(scores[kind].mean()))
    behind = scores[best] - scores["qatkit"]
    return {
        "to the better free file": {key: ratio(times[free[key]], times["qatkit"]) for key, times in timed.items()},
        "fp32": {key: ratio(times["fp32"], times["qatkit"])[0] for key, times in timed.items()},
        "free fp32": {key: ratio(times["fp32"], times[free[key]])[0] for key, times in timed.items()},
        "behind": float(behind.mean()),
        "interval": 1.96 * float(behind.std() / len(behind) ** 0.5),
    }
