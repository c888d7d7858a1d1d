"""Measure memory and time of one training step with cross-entropy and distillation over a vocabulary.

Run: python benchmarks/kd_loss.py [--packages FOLDER]
Takes about two minutes. FOLDER holds Liger Kernel: `pip install --no-deps --target FOLDER liger-kernel triton`.

2,048 tokens, 32,000 classes, width 512 for student and teacher, float32, cross-entropy and KL at temperature 2, forward
and backward pass on one thread. Every variant runs in its own process, and rounds alternate between variants. Memory is
the peak of the process above its memory before the first step. Time is CPU time, which other processes disturb less
than wall time: the median over the steps of all rounds except the first of each. The lower bound is the time of the
four unavoidable matrix products, each over all tokens at once and into allocated memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from harness import Claim, finish
from torch import Tensor
from torch.nn import functional as F

from qatkit.distillation.chunked import linear_kd_loss

TOKENS, CLASSES, WIDTH, TEMPERATURE, ALPHA = 2048, 32000, 512, 2.0, 0.5
STEPS = 3
NAMES = {
    "plain": "plain torch",
    "liger": "Liger Kernel, eager",
    "liger_compiled": "Liger Kernel, compiled",
    "qatkit": "qatkit.linear_kd_loss",
    "floor": "only the matrix products",
}


def plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as an ordinary training loop computes it."""
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    log_q, log_p = (F.log_softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return ALPHA * divergence + (1 - ALPHA) * F.cross_entropy(student, labels)


def step_of(variant: str, parts: list[Tensor]) -> Callable[[], object]:
    """One forward and backward pass of the variant."""
    if variant == "floor":
        hidden, weight = (part.detach() for part in parts[:2])
        logits, *grads = (torch.zeros(size) for size in ((TOKENS, CLASSES), hidden.shape, weight.shape))

        def products() -> None:
            torch.mm(parts[2], parts[3].t(), out=logits)
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grads[0])
            torch.mm(logits.t(), hidden, out=grads[1])

        return products
    if variant.startswith("liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # its beta of 0 is the KL divergence, without the factor T**2
        compiled = variant == "liger_compiled"
        soft = ALPHA * TEMPERATURE**2
        kernel = LigerFusedLinearJSDLoss(1 - ALPHA, soft, beta=0.0, temperature=TEMPERATURE, compiled=compiled)
        return lambda: kernel(*parts).backward()
    if variant == "plain":
        return lambda: plain(*parts).backward()
    return lambda: linear_kd_loss(*parts, temperature=TEMPERATURE, alpha=ALPHA).backward()


def measure(variant: str, folder: str) -> None:
    """In a process of its own: print the peak memory in MB and the seconds of every step."""
    if variant.startswith("liger"):  # with Triton in reach, torch imports it in the first step
        sys.path.insert(0, folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = [torch.randn(TOKENS, WIDTH), torch.randn(CLASSES, WIDTH) / WIDTH**0.5]
    parts += [torch.randn(TOKENS, WIDTH), torch.randn(CLASSES, WIDTH) / WIDTH**0.5, torch.randint(CLASSES, (TOKENS,))]
    for part in parts[:2]:
        part.requires_grad_()
    step = step_of(variant, parts)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    seconds = []
    for _ in range(1 + STEPS):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
        for part in parts:
            part.grad = None
    print(json.dumps({"memory": (status("VmHWM") - before) / 1000, "seconds": seconds[1:]}))


def status(key: str) -> int:
    """A number of this process from /proc, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def main(folder: str, rounds: int) -> None:
    variants = [variant for variant in NAMES if folder or not variant.startswith("liger")]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    memory: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, __file__, "--variant", variant, "--packages", folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            seconds[variant] += found["seconds"]
            memory[variant].append(found["memory"])
    time_of = {variant: median(values) for variant, values in seconds.items()}
    rows = [
        {
            "variant": NAMES[variant],
            "extra memory, MB": "" if variant == "floor" else f"{median(memory[variant]):.0f}",
            "seconds": f"{time_of[variant]:.2f}",
            "relative to plain torch": f"{time_of[variant] / time_of['plain']:.2f}x",
            "relative to matrix products": f"{time_of[variant] / time_of['floor']:.2f}x",
        }
        for variant in variants
    ]
    share, ours = time_of["qatkit"] / time_of["plain"], median(memory["qatkit"])
    claims = [
        Claim("extra memory of linear_kd_loss", "<= 300 MB", f"{ours:.0f} MB", ours <= 300),
        Claim("time of linear_kd_loss relative to plain torch", "<= 0.70x", f"{share:.2f}x", share <= 0.70),
    ]
    others = {variant: time_of[variant] for variant in variants if variant.startswith("liger")}
    if others:
        best = min(others.values())
        text = f"{time_of['qatkit']:.2f} s and {best:.2f} s"
        claims.append(Claim("linear_kd_loss compared with Liger Kernel", "not slower", text, time_of["qatkit"] <= best))
    finish("kd_loss", rows, claims)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=list(NAMES))
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments.packages)
    else:
        main(arguments.packages, arguments.rounds)
