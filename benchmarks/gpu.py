"""What the costly parts take on a GPU: the fused distillation loss, masks, 2:4 products and a QLoRA step.

Run: bash benchmarks/gpu.sh, which runs the tests that need a GPU first; or python benchmarks/gpu.py [--quick]
--quick shows the mechanics on any device and writes no results.

Methods of a group take turns; time is the median by the device's own clock (CUDA events), after two turns that do not
count. Memory is the most that torch's allocator held above what it held before. Liger Kernel and bitsandbytes have rows
where they are installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from harness import Claim, finish
from kd_loss import ALPHA, TEMPERATURE, plain
from prune_cost import six_patterns
from qlora import prepared, stepper
from torch import Tensor, nn
from torch.nn.utils import prune

from qatkit.distillation.chunked import linear_kd_loss
from qatkit.models import llama
from qatkit.pruning.masks import apply_mask, global_masks, nm_mask

Methods = dict[str, Callable[[], object]]
FULL = {"tokens": 8192, "classes": 128256, "width": 2048, "teacher": 4096, "weights": 10**8, "side": 4096, "turns": 10}
QUICK = {"tokens": 64, "classes": 512, "width": 32, "teacher": 64, "weights": 10**4, "side": 128, "turns": 1}


def measured(what: str, methods: Methods, turns: int, device: torch.device) -> list[dict[str, Any]]:
    """Every method in turn: its median milliseconds and the most memory it took besides, in MB."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    memory = dict.fromkeys(methods, 0)
    cuda = device.type == "cuda"
    for turn in range(2 + turns):
        for name, method in methods.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                method()
                end.record()
                torch.cuda.synchronize()
                took = begin.elapsed_time(end)
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated() - before)
            else:
                started = time.perf_counter()
                method()
                took = 1000 * (time.perf_counter() - started)
            if turn >= 2:
                times[name].append(took)
    return [
        {
            "what": what,
            "method": name,
            "ms": round(median(times[name]), 3),
            "extra memory, MB": round(memory[name] / 1e6) if cuda else "",
        }
        for name in methods
    ]


def distillation(size: dict[str, int], device: torch.device) -> list[dict[str, Any]]:
    """Cross-entropy and KL over a vocabulary, forward and backward, bfloat16."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    widths = size["width"], size["teacher"]
    parts = []
    for width in widths:
        parts += [torch.randn(size["tokens"], width, **options)]
        parts += [torch.randn(size["classes"], width, **options) / width**0.5]
    parts.append(torch.randint(size["classes"], (size["tokens"],), device=device))
    for part in parts[:2]:
        part.requires_grad_()

    def backward(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def step() -> None:
            loss(*parts).backward()
            for part in parts:
                part.grad = None

        return step

    methods: Methods = {
        "qatkit.linear_kd_loss": backward(
            lambda *tensors: linear_kd_loss(*tensors, temperature=TEMPERATURE, alpha=ALPHA)
        ),
        "plain torch": backward(plain),
    }
    if device.type == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        kernel = LigerFusedLinearJSDLoss(1 - ALPHA, ALPHA * TEMPERATURE**2, beta=0.0, temperature=TEMPERATURE)
        methods["Liger Kernel"] = backward(kernel)
    what = (
        f"CE + KL, {size['tokens']:,} tokens, {size['classes']:,} classes, widths {widths[0]} and {widths[1]}, bfloat16"
    )
    return measured(what, methods, size["turns"], device)


def masks(size: dict[str, int], device: torch.device) -> list[dict[str, Any]]:
    """Half of the weights over a model, and 2:4 of one layer."""
    weights = [
        nn.Parameter(torch.randn(round(share * size["weights"]), device=device)) for share in (0.4, 0.3, 0.2, 0.1)
    ]
    named = {str(index): weight for index, weight in enumerate(weights)}

    def ours() -> None:
        for weight, mask in zip(weights, global_masks(named, 0.5).values(), strict=True):
            apply_mask(nn.Parameter(weight.detach().clone()), mask)

    def torch_prune() -> None:
        layers = []
        for weight in weights:
            layer = nn.Module()
            layer.weight = nn.Parameter(weight.detach().clone())
            layers.append(layer)
        prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.5)

    side = size["side"]
    weight = torch.randn(side, side, device=device)
    one: Methods = {"qatkit": ours, "global_unstructured": torch_prune}
    two: Methods = {"qatkit": lambda: nm_mask(weight, 2, 4), "six patterns": lambda: six_patterns(weight)}
    rows = measured(f"50% of {size['weights']:,} float32 weights", one, size["turns"], device)
    return rows + measured(f"2:4 of {side} x {side} float32", two, size["turns"], device)


def products(size: dict[str, int], device: torch.device) -> list[dict[str, Any]]:
    """A linear layer with 2:4 zeros by dense and by sparse kernels; no row where there are none."""
    if device.type != "cuda":
        return []
    from qatkit.pruning.semi_structured import use_sparse_kernels

    side = size["side"]
    dense = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, torch.bfloat16)
    sparse = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, torch.bfloat16)
    with torch.no_grad():
        dense[0].weight.mul_(nm_mask(dense[0].weight, 2, 4))
        sparse[0].weight.copy_(dense[0].weight)
        use_sparse_kernels(sparse)
        x = torch.randn(size["tokens"], side, device=device, dtype=torch.bfloat16)
        methods: Methods = {"dense": lambda: dense(x), "use_sparse_kernels": lambda: sparse(x)}
        return measured(f"{size['tokens']:,} x {side} x {side}, 2:4 zeros, bfloat16", methods, size["turns"], device)


def adapters(size: dict[str, int], device: torch.device) -> list[dict[str, Any]]:
    """A training step of a Llama with float32 weights through LoRA and, with bitsandbytes, QLoRA."""
    names = ["LoRA", "QLoRA nf4"] if find_spec("bitsandbytes") else ["LoRA"]
    width = min(size["width"], 1024)
    base = llama(
        vocab_size=2048, hidden=width, layers=4, heads=width // 32, kv_heads=width // 32, intermediate=4 * width,
        context=512,
    )  # fmt: skip
    tokens = torch.randint(2048, (2, 128), device=device)
    methods: Methods = {}
    for name in names:
        step, _ = stepper(prepared(base, name).to(device), 1e-3)
        # step=step: a lambda looks its names up when it is called, and would take the last one
        methods[name] = lambda step=step: step({"input_ids": tokens, "labels": tokens})
    return measured(f"a step of a Llama of width {width}, 256 tokens", methods, size["turns"], device)


def claims_of(rows: list[dict[str, Any]]) -> list[Claim]:
    """What the project wants of itself on a GPU of the H100's class."""
    found = {(row["what"].split(",")[0].split(" of")[0], row["method"]): row for row in rows}
    ours, theirs = found["CE + KL", "qatkit.linear_kd_loss"], found.get(("CE + KL", "Liger Kernel"))
    claims = [
        Claim("linear_kd_loss, time", "<= 40 ms", f"{ours['ms']:.1f} ms", ours["ms"] <= 40),
        Claim(
            "linear_kd_loss, memory", "<= 3000 MB", f"{ours['extra memory, MB']} MB", ours["extra memory, MB"] <= 3000
        ),
    ]
    if theirs:
        text = f"{ours['ms']:.1f} ms against {theirs['ms']:.1f} ms"
        claims.append(Claim("linear_kd_loss against Liger Kernel", "not slower", text, ours["ms"] <= theirs["ms"]))
    return claims


def main(quick: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not quick and device.type != "cuda":
        sys.exit("no CUDA device here; --quick shows the mechanics without one")
    torch.manual_seed(0)
    rows = [row for part in (distillation, masks, products, adapters) for row in part(QUICK if quick else FULL, device)]
    if quick:
        for row in rows:
            print(" | ".join(str(value) for value in row.values()))
        return
    for row in rows:
        row["what"] = f"{row['what']}; {torch.cuda.get_device_name()}"
    finish("gpu", rows, claims_of(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
