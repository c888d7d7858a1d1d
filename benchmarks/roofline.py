"""The roofline's predictions against latencies that ONNX Runtime needs on this machine.

Run: python benchmarks/roofline.py [--quick]

Every network is exported in each scheme with random weights, because latency does not depend on their values. It is
predicted from `local_device()`, as in `qatkit profile`, and measured as the median wall time of a call on one thread.
Run it on an idle machine.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import Claim, finish
from scipy.stats import spearmanr
from serve_models import Encoder
from torch import Tensor, nn

from qatkit.advise.devices import Device
from qatkit.advise.local import local_device
from qatkit.advise.roofline import LayerCost, Technique, call_seconds, layer_costs, seconds
from qatkit.errors import QatkitWarning
from qatkit.export.onnx.format import export_onnx
from qatkit.export.onnx.runtime import load_runtime
from qatkit.models import cnn, mlp, resnet
from qatkit.quantization import calibrate
from qatkit.quantization.placement.preparation import prepare_for_target
from qatkit.report.bench import in_random_order

NONE, INT8 = Technique("none"), Technique("W8A8", 8, "int8")
INT4 = Technique("W4A16", weight_bits=5)  # a float32 scale per 32 weights
LEAST = 0.9
"""The rank correlation that is claimed."""


@dataclass(frozen=True)
class Network:
    """A network, a narrower one, and its inputs."""

    build: Callable[[], nn.Module]
    narrow: Callable[[], nn.Module]
    example: Tensor
    """One sample."""
    target: str = "onnxruntime"
    """How it is quantized to int8."""
    linear: bool = True
    """Whether its layers have kernels with packed 4-bit weights."""
    batches: tuple[int, ...] = (1, 64)


IMAGE, DYNAMIC = torch.rand(1, 1, 32, 32), {"target": "onnxruntime-dynamic"}
NETWORKS = {
    "MLP, small": Network(partial(mlp, 1024, (256, 256)), partial(mlp, 1024, (128, 128)), IMAGE),
    "MLP, large": Network(partial(mlp, 1024, (2048, 2048, 2048)), partial(mlp, 1024, (1024, 1024, 1024)), IMAGE),
    "CNN": Network(
        partial(cnn, channels=(16, 32, 64), size=32), partial(cnn, channels=(8, 16, 32), size=32), IMAGE, linear=False
    ),
    "ResNet": Network(partial(resnet, (16, 32, 64)), partial(resnet, (8, 16, 32)), IMAGE, linear=False),
    "ResNet, wide": Network(
        partial(resnet, (64, 128, 256)), partial(resnet, (32, 64, 128)), IMAGE, linear=False, batches=(1, 16)
    ),
    "encoder": Network(
        partial(Encoder, 128), partial(Encoder, 64), IMAGE, batches=(1, 16), **DYNAMIC,  # type: ignore[arg-type]
    ),
    "encoder, wide": Network(
        partial(Encoder, 384), partial(Encoder, 192), IMAGE, batches=(1, 8), **DYNAMIC  # type: ignore[arg-type]
    ),
}  # fmt: skip


def files(network: Network, folder: Path) -> dict[str, tuple[Path, nn.Module, Technique]]:
    """The exported files of a network by scheme, with the plain model and the technique that predict each."""
    torch.manual_seed(0)
    dense, narrow = network.build().eval(), network.narrow().eval()
    made = {"fp32": (dense, dense, NONE), "half of the neurons": (narrow, narrow, NONE)}
    made["W8A8"] = (quantized(dense, network.target, network.example), dense, INT8)
    if network.linear:
        made["W4A16"] = (quantized(dense, "onnxruntime-int4", network.example), dense, INT4)
    written = {}
    for name, (model, plain, technique) in made.items():
        path = folder / name.replace(" ", "_") / "model.onnx"
        path.parent.mkdir()
        export_onnx(model, network.example, path)
        written[name] = (path, plain, technique)
    return written


def quantized(dense: nn.Module, target: str, example: Tensor) -> nn.Module:
    model = copy.deepcopy(dense)
    exclude = ["*patches"] if isinstance(model, Encoder) else []
    prepare_for_target(model, target, example, exclude=exclude)
    calibrate(model, [example])
    return model.eval()


def predictions(costs: list[LayerCost], technique: Technique, device: Device) -> tuple[float, float]:
    """Seconds by bandwidth and rates alone, and with caches and overheads."""
    bare = replace(device, caches=(), call=0.0, operator=0.0)
    return sum(seconds(layer, bare, "fp32", technique) for layer in costs), call_seconds(
        costs, device, "fp32", technique
    )


def measured(name: str, network: Network, device: Device, repeats: int) -> list[dict[str, Any]]:
    """The rows of one network: predicted and measured milliseconds of every scheme and batch size."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        written = files(network, Path(folder))
        runtimes = {scheme: load_runtime(path, 1) for scheme, (path, _, _) in written.items()}
        for size in network.batches:
            batch = network.example.repeat(size, *[1] * (network.example.dim() - 1))
            timers = {key: partial(timed, partial(runtime, batch)) for key, runtime in runtimes.items()}
            times = {key: median(found) for key, found in in_random_order(timers, repeats).items()}
            for scheme, (_, plain, technique) in written.items():
                costs = layer_costs(plain.to("meta"), partial(plain, batch.to("meta")))
                bare, full = predictions(costs, technique, device)
                rows.append(
                    {
                        "network": name, "batch": size, "scheme": scheme, "measured, ms": times[scheme] * 1e3,
                        "predicted, ms": full * 1e3, "without caches and overheads, ms": bare * 1e3,
                    }
                )  # fmt: skip
                print(*rows[-1].values(), flush=True)
    return rows


def timed(call: Callable[[], object], least: float = 5e-3) -> float:
    """Seconds per call, over several calls."""
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < least:
        call()
        count += 1
    return passed / count


def agreement(rows: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Rank correlation, median factor between both times, and the fraction of pairs of schemes in the right order."""
    rank = float(spearmanr([row["measured, ms"] for row in rows], [row[key] for row in rows]).statistic)
    factors = [max(row[key] / row["measured, ms"], row["measured, ms"] / row[key]) for row in rows]
    right, pairs = 0, 0
    for one, other in combinations(rows, 2):
        if (one["network"], one["batch"]) == (other["network"], other["batch"]):
            pairs += 1
            right += (one["measured, ms"] < other["measured, ms"]) == (one[key] < other[key])
    return rank, median(factors), right / pairs


def main(quick: bool) -> None:
    warnings.simplefilter("ignore", QatkitWarning)  # such as layers that stay in floating point
    device = local_device(threads=1)
    print(device, flush=True)
    rows = []
    for name, network in list(NETWORKS.items())[: 2 if quick else None]:
        rows += measured(name, network, device, 3 if quick else 7)
    rank, factor, right = agreement(rows, "predicted, ms")
    bare = agreement(rows, "without caches and overheads, ms")
    claims = [
        Claim("rank correlation of predicted and measured latencies", f">= {LEAST}", f"{rank:.3f}", rank >= LEAST),
        Claim("median error, as a factor between predicted and measured", "stated", f"{factor:.2f}x", True),
        Claim("pairs of schemes of the same network and batch in the right order", "stated", f"{right:.0%}", True),
        Claim(
            "without caches and overheads: correlation, factor, pairs", "stated",
            f"{bare[0]:.3f}, {bare[1]:.2f}x, {bare[2]:.0%}", True,
        ),
    ]  # fmt: skip
    finish("roofline", rows, claims)


if __name__ == "__main__":
    main("--quick" in sys.argv)
