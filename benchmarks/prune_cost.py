"""Measure the cost of masks: 50% of 100 million weights over a model, 2:4 in one layer, and keeping the zeros.

Run: python benchmarks/prune_cost.py [--keep]
Takes about three minutes and 3 GB of memory.

Every method gets the same four weights and runs in its own process on one thread, alternating with the others. Time is
the median over the turns. Memory is the peak of the process above the weights. `global_unstructured` and qatkit also
write the zeros; topk and kthvalue stop at the masks. Only qatkit breaks ties between equal magnitudes, so the others
prune the requested count up to their ties.

With --keep, the rows over a model stay those of the previous run, if their code has not changed.

The cost of keeping zeros is measured while training a small transformer on 1024 tokens per step: CPU time of every hook
of the callback divided by that of whole steps. The weights are read and written once per step, independent of the
number of tokens, so fewer tokens per step make the fraction larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import RESULTS, Claim, finish
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks.pruning import ConstantPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, count_zeros, global_masks, nm_mask

SPARSITY = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Weights = list[nn.Parameter]


def qatkit(weights: Weights) -> int:
    """`global_masks`, with the zeros written in place."""
    masks = global_masks({str(index): weight for index, weight in enumerate(weights)}, SPARSITY)
    for weight, mask in zip(weights, masks.values(), strict=True):
        apply_mask(weight, mask)
    return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in masks.values())


def global_unstructured(weights: Weights) -> int:
    """The function of torch that Lightning's ModelPruning calls."""
    layers = []
    for weight in weights:
        layer = nn.Module()
        layer.weight = weight
        layers.append(layer)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=SPARSITY)
    return sum(layer.weight.numel() - int(torch.count_nonzero(layer.weight)) for layer in layers)


def topk(weights: Weights) -> int:
    """The largest of the smallest, by torch.topk over a concatenation."""
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    count = round(SPARSITY * len(magnitudes))
    return _above(weights, torch.topk(magnitudes, count, largest=False, sorted=False).values.max())


def kthvalue(weights: Weights) -> int:
    """torch.kthvalue over a concatenation."""
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    return _above(weights, torch.kthvalue(magnitudes, round(SPARSITY * len(magnitudes))).values)


def _above(weights: Weights, threshold: Tensor) -> int:
    masks = [weight.detach().abs() > threshold for weight in weights]
    return sum(mask.numel() - int(torch.count_nonzero(mask)) for mask in masks)


METHODS: dict[str, Callable[[Weights], int]] = {
    "qatkit": qatkit,
    "global_unstructured": global_unstructured,
    "topk": topk,
    "kthvalue": kthvalue,
}


def one(method: str, dtype: str, numel: int) -> None:
    """The body of a process: prune once; print seconds, bytes above the weights and the number of pruned weights."""
    torch.manual_seed(0)
    shares = [0.4, 0.3, 0.2, 0.1]
    weights = [nn.Parameter(torch.empty(round(share * numel), dtype=DTYPES[dtype]).normal_()) for share in shares]
    METHODS[method]([nn.Parameter(torch.randn(1000).to(DTYPES[dtype]))])  # what torch loads on first use
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    pruned = METHODS[method](weights)
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps([seconds, peak, pruned]))


def over_the_model(numel: int, turns: int) -> tuple[list[dict[str, object]], list[Claim]]:
    rows, claims = [], []
    for dtype in DTYPES:
        found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in METHODS}
        for _ in range(turns):
            for name in METHODS:
                command = [sys.executable, __file__, "--one", name, dtype, "--numel", str(numel)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name].append(tuple(json.loads(out)))
        size = numel * DTYPES[dtype].itemsize
        seconds = {name: median(run[0] for run in runs) for name, runs in found.items()}
        memory = {name: median(run[1] for run in runs) / size for name, runs in found.items()}
        for name, runs in found.items():
            rows.append(
                {
                    "operation": f"prune {SPARSITY:.0%} of {numel:,} {dtype} weights",
                    "method": name,
                    "ms": 1000 * seconds[name],
                    "peak memory / weight memory": f"{memory[name]:.2f}x",
                    "pruned": f"{runs[0][2]:,}",
                }
            )
        ratio, limit = seconds["qatkit"] / seconds["global_unstructured"], 0.35 if dtype == "float32" else 0.6
        exact = all(run[2] == round(SPARSITY * numel) for run in found["qatkit"])
        what = f"{numel:,} {dtype} weights, model-wide"
        claims += [
            Claim(f"time to compute masks, {what}", "<= 0.25x of global_unstructured", f"{ratio:.3f}x", ratio <= 0.25),
            Claim(
                f"extra memory to compute masks, {what}",
                f"<= {limit}x of the weights",
                f"{memory['qatkit']:.2f}x",
                memory["qatkit"] <= limit,
            ),
            Claim(f"number of pruned weights, {what}", "exact", f"{found['qatkit'][0][2]:,}", exact),
        ]
    return rows, claims


def six_patterns(weight: Tensor) -> Tensor:
    """2:4 as in ASP: the sums of all six ways to keep two of four by a matrix product, and the best of them."""
    two = [pattern for pattern in itertools.product((0.0, 1.0), repeat=4) if sum(pattern) == 2]
    patterns = torch.tensor(two, dtype=weight.dtype, device=weight.device)
    best = (weight.abs().view(-1, 4) @ patterns.t()).argmax(dim=1)
    return patterns[best].view(weight.shape).bool()


def two_of_four(turns: int) -> tuple[list[dict[str, object]], list[Claim]]:
    weight = torch.randn(4096, 4096)
    methods: dict[str, Callable[[], Tensor]] = {
        "qatkit": lambda: nm_mask(weight, 2, 4),
        "six patterns": lambda: six_patterns(weight),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    masks = {}
    for _ in range(3 * turns):
        for name, method in methods.items():
            start = time.perf_counter()
            masks[name] = method()
            seconds[name].append(time.perf_counter() - start)
    rows: list[dict[str, object]] = [
        {
            "operation": "2:4 mask of 4096 x 4096 float32",
            "method": name,
            "ms": 1000 * median(values),
            "peak memory / weight memory": "",
            "pruned": f"{int((~masks[name]).sum()):,}",
        }
        for name, values in seconds.items()
    ]
    ratio = median(seconds["qatkit"]) / median(seconds["six patterns"])
    return rows, [
        Claim("time to compute a 2:4 mask, 4096 x 4096", "<= 0.25x of six patterns", f"{ratio:.3f}x", ratio <= 0.25)
    ]


class Held(ConstantPruning):
    """Records the CPU time of its own hooks and of whole steps."""

    def __init__(self) -> None:
        super().__init__()
        self.own: list[float] = []
        self.steps: list[float] = []
        self.started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.process_time()
        self.own.append(0.0)

    def on_before_optimizer_step(self, *args: Any) -> None:
        start = time.process_time()
        super().on_before_optimizer_step(*args)
        self.own[-1] += time.process_time() - start

    def on_train_batch_end(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_end(*args)
        self.own[-1] += time.process_time() - start
        self.steps.append(time.process_time() - self.started)


class LanguageModel(LightningModule):
    """A small transformer that predicts the next of 100 tokens."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Embedding(100, width), nn.Linear(width, 100)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(batch.shape[1] - 1)
        logits = self.head(self.blocks(self.embed(batch[:, :-1]), mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def holding(steps: int) -> tuple[list[dict[str, object]], list[Claim]]:
    module, held = LanguageModel(), Held()
    weights = {name: layer.weight for name, layer in prunable_layers(module).items()}
    for weight, mask in zip(weights.values(), global_masks(weights, SPARSITY).values(), strict=True):
        apply_mask(weight, mask)
    warm_up = 5
    trainer = Trainer(
        accelerator="cpu",
        max_steps=warm_up + steps,
        callbacks=[held],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(100, (16, 65))
    trainer.fit(module, DataLoader([tokens] * (warm_up + steps), batch_size=None))
    added = median(held.own[warm_up:]) / (median(held.steps[warm_up:]) - median(held.own[warm_up:]))
    parameters = sum(weight.numel() for weight in weights.values())
    row: dict[str, object] = {
        "operation": f"keep {SPARSITY:.0%} of {parameters:,} weights at zero for a step of 1024 tokens",
        "method": "qatkit",
        "ms": 1000 * median(held.own[warm_up:]),
        "peak memory / weight memory": "",
        "pruned": f"{sum(count_zeros(weights).values()):,}",
    }
    return [row], [
        Claim("overhead of ConstantPruning() in a step of 1024 tokens", "<= 2%", f"{added:.2%}", added <= 0.02)
    ]


def measured_before() -> tuple[list[dict[str, object]], list[Claim]]:
    """The rows of the results file for masks over a model."""
    content = json.loads((RESULTS / "prune_cost.json").read_text())
    rows = [row for row in content["rows"] if row["operation"].startswith(f"prune {SPARSITY:.0%} of")]
    return rows, [Claim(**claim) for claim in content["claims"] if claim["text"].endswith("model-wide")]


def main(numel: int, turns: int, keep: bool) -> None:
    torch.manual_seed(0)
    rows, claims = measured_before() if keep else over_the_model(numel, turns)
    for more_rows, more_claims in (two_of_four(turns), holding(20 * turns)):
        rows += more_rows
        claims += more_claims
    finish("prune_cost", rows, claims)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the rows over a model, whose code has not changed")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DTYPE"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        one(*options.one, options.numel)
    else:
        main(options.numel, options.turns, options.keep)
