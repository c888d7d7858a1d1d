"""Measure the expensive parts on a GPU: the fused distillation loss, masks, 2:4 products, QAT and adapters.

Run: bash benchmarks/gpu.sh, which runs the GPU tests first; or python benchmarks/gpu.py [--quick]
--quick tests the mechanics on any device and writes no results.

Methods of a group alternate. Time is the median in CUDA events, after two warmup turns. Memory is the peak of torch's
allocator above the memory held before. Liger Kernel, torchao and bitsandbytes have rows if they are installed. A method
that fails gets a row that says so, and the script then exits with 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import gpu_qat
import torch
from gpu_timing import FAILED, Methods, Row, failed, measured
from harness import Claim, finish
from kd_loss import ALPHA, TEMPERATURE, plain
from prune_cost import six_patterns
from qlora import prepared, stepper
from torch import Tensor, nn
from torch.nn.utils import prune

from qatkit.distillation.chunked import linear_kd_loss
from qatkit.models import llama
from qatkit.pruning.masks import apply_mask, global_masks, nm_mask

FULL = {
    "tokens": 8192, "classes": 128256, "width": 2048, "teacher": 4096, "weights": 10**8, "side": 4096,
    "qat width": 4096, "qat wide": 14336, "qat tokens": 8192,
    "hidden": 2048, "layers": 8, "rows": 8, "context": 1024, "vocabulary": 32000, "turns": 10,
}  # fmt: skip
QUICK = {
    "tokens": 64, "classes": 512, "width": 32, "teacher": 64, "weights": 10**4, "side": 128,
    "qat width": 128, "qat wide": 256, "qat tokens": 32,
    "hidden": 64, "layers": 1, "rows": 2, "context": 32, "vocabulary": 512, "turns": 1,
}  # fmt: skip


def distillation(size: dict[str, int], device: torch.device) -> list[Row]:
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


def masks(size: dict[str, int], device: torch.device) -> list[Row]:
    """50% of the weights of a model, and 2:4 in one layer."""
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
    rows = measured(f"prune 50% of {size['weights']:,} float32 weights", one, size["turns"], device)
    return rows + measured(f"2:4 mask of {side} x {side} float32", two, size["turns"], device)


def products(size: dict[str, int], device: torch.device) -> list[Row]:
    """Linear layers with 2:4 sparsity, with dense and with sparse kernels; no rows if there are no sparse kernels."""
    if device.type != "cuda":
        return []
    from qatkit.pruning.semi_structured import use_sparse_kernels

    rows = []
    for side in (size["side"], 2 * size["side"]):
        dense = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, torch.bfloat16)
        sparse = nn.Sequential(nn.Linear(side, side, bias=False)).to(device, torch.bfloat16)
        with torch.no_grad():
            dense[0].weight.mul_(nm_mask(dense[0].weight, 2, 4))
            sparse[0].weight.copy_(dense[0].weight)
            use_sparse_kernels(sparse)
            x = torch.randn(size["tokens"], side, device=device, dtype=torch.bfloat16)
            # each as it is called: both lambdas run before the next side
            methods: Methods = {"dense": lambda: dense(x), "use_sparse_kernels": lambda: sparse(x)}  # noqa: B023
            what = f"{size['tokens']:,} x {side} x {side}, 2:4 sparse, bfloat16"
            rows += measured(what, methods, size["turns"], device, calls=20)
    return rows


def adapters(size: dict[str, int], device: torch.device) -> list[Row]:
    """A training step of a Llama with AdamW, with bfloat16 weights on a GPU: full fine-tuning, LoRA and QLoRA.

    Adapters are stored in float32 and multiplied in bfloat16 by autocast, as in a Trainer with "bf16-mixed". They add
    several small kernels to each layer, whose launch time matters for steps with few tokens. Memory includes a copy
    of the weights, the optimizer and the step, separately for each method.
    """
    names = ["full fine-tuning", "LoRA", *(["QLoRA nf4"] if find_spec("bitsandbytes") else [])]
    width, cuda = size["hidden"], device.type == "cuda"
    with torch.device(device):
        base: nn.Module = llama(
            vocab_size=size["vocabulary"], hidden=width, layers=size["layers"], heads=width // 32, kv_heads=width // 64,
            intermediate=4 * width, context=size["context"],
        )  # fmt: skip
        tokens = torch.randint(size["vocabulary"], (size["rows"], size["context"]))
    base = base.bfloat16() if cuda else base
    count = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    what = (
        f"training step of a {count:.0f}M-parameter Llama, {tokens.numel():,} tokens "
        "(memory: with weights and optimizer)"
    )
    rows = []
    for name in names:
        gc.collect()
        held = torch.cuda.memory_allocated() if cuda else 0
        try:
            step = stepper(prepared(base, name), 1e-4)[0]  # a name for the optimizer would keep it for the next method

            def once(step: Callable[[Any], float] = step) -> None:
                with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                    step({"input_ids": tokens, "labels": tokens})

            rows += measured(what, {name: once}, size["turns"], device, held)
            del step, once
        except Exception as error:  # the others are measured all the same
            rows.append(failed(what, name, error))
        gc.collect()
    return rows


PARTS: tuple[Callable[[dict[str, int], torch.device], list[Row]], ...] = (
    distillation, masks, products, gpu_qat.steps, adapters
)  # fmt: skip


def claims_of(rows: list[Row]) -> list[Claim]:
    """Targets on a GPU of the class of an H200."""
    broken = [f"{row['method']} ({row['operation'].split(',')[0]})" for row in rows if row["ms"] == FAILED]
    claims = [Claim("methods that ran", "all", f"failed: {', '.join(broken)}" if broken else "all", not broken)]
    found = {row["method"]: row for row in rows if row["operation"].startswith("CE + KL") and row["ms"] != FAILED}
    ours, theirs = found.get("qatkit.linear_kd_loss"), found.get("Liger Kernel")
    if ours:
        time, memory = ours["ms"], ours["extra memory, MB"]
        claims.append(Claim("linear_kd_loss, time", "<= 40 ms", f"{time:.1f} ms", time <= 40))
        claims.append(Claim("linear_kd_loss, memory", "<= 3000 MB", f"{memory} MB", memory <= 3000))
    if ours and theirs:
        text = f"{ours['ms']:.1f} ms and {theirs['ms']:.1f} ms"
        claims.append(
            Claim("linear_kd_loss compared with Liger Kernel", "not slower", text, ours["ms"] <= theirs["ms"])
        )
    return claims + gpu_qat.claims_of(rows)


def main(quick: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not quick and device.type != "cuda":
        sys.exit("no CUDA device here; --quick shows the mechanics without one")
    torch.manual_seed(0)
    rows: list[Row] = []
    for part in PARTS:
        try:
            rows += part(QUICK if quick else FULL, device)
        except Exception as error:  # the other parts are measured all the same
            rows.append(failed(part.__name__, "all methods", error))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if quick:
        for row in rows:
            print(" | ".join(str(value) for value in row.values()))
        sys.exit(any(row["ms"] == FAILED for row in rows))
    for row in rows:
        row["operation"] = f"{row['operation']}; {torch.cuda.get_device_name()}"
    finish("gpu", rows, claims_of(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
