"""Compare QLoRA with LoRA, QAT + LoRA and full fine-tuning: time of a step, memory of tensors, loss.

Run: python benchmarks/qlora.py [--quick]
Takes about four minutes on a CPU; --quick tests the mechanics in half a minute and writes nothing.

One Llama with random weights is first trained fully for some steps, then with every method for the same steps on the
same batches of Python's standard library, on one thread with AdamW in float32. Methods alternate step by step, so
that other load affects all of them alike; time is the median CPU time. Memory is the memory kept between steps
(weights, optimizer state) plus the peak of the other tensors in a step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from harness import Claim, finish
from tensor_memory import TensorMemory
from torch import Tensor, nn

from qatkit import QuantSpec, prepare_qat
from qatkit.data import stdlib_text
from qatkit.lora.attachment import Adapter, attach, base_layers, target_layers
from qatkit.lora.bits import quantize_base
from qatkit.models import llama
from qatkit.tasks import answers, call, evaluate, token_loss

METHODS = ["full fine-tuning", "LoRA", "QLoRA nf4", "QLoRA int8", "QAT + LoRA"]
RATES = {"full fine-tuning": 5e-4}  # a tenth of what adapters take, as usual
SIZES: dict[str, dict[str, Any]] = {
    "full": {"hidden": 512, "layers": 4, "heads": 8, "kv_heads": 4, "intermediate": 1408, "rows": 8, "context": 128},
    "quick": {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 128, "rows": 2, "context": 32},
}


def prepared(base: nn.Module, method: str) -> nn.Module:
    """A copy of the base model, prepared for its method."""
    model = copy.deepcopy(base)
    if method == "full fine-tuning":
        return model
    names = target_layers(model)
    if method.startswith("QLoRA"):
        quantize_base(model, base_layers(model), 4 if "nf4" in method else 8)
    if method.startswith("QAT"):
        prepare_qat(model, weight=QuantSpec(4, strategy="group", group_size=32, observer="lsq"), exclude=["lm_head"])
    torch.manual_seed(0)
    attach(model, names, Adapter(rank=16, alpha=32))
    return model


def stepper(model: nn.Module, lr: float) -> tuple[Callable[[Any], float], torch.optim.Optimizer]:
    """A function that takes one step on a batch, and its optimizer."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def step(batch: Any) -> float:
        optimizer.zero_grad()
        loss, _ = token_loss(*answers(call(model, batch), batch))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, optimizer


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and optimizer state; for 4-bit weights including their scales."""
    tensors = list(model.state_dict(keep_vars=True).values())
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = dict(SIZES["quick" if quick else "full"])
    rows, context = size.pop("rows"), size["context"]
    warm, steps = (2, 3) if quick else (40, 24)
    data = stdlib_text(
        vocab_size=512 if quick else 2048, context=context, include=["email/*"] if quick else ["*"],
        val_fraction=0.02, test_fraction=0.01, batch_size=rows, seed=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    batches = endless(data.train_dataloader())
    held_out = [batch for batch, _ in zip(data.val_dataloader(), range(2 if quick else 8), strict=False)]
    base = llama(vocab_size=512 if quick else 2048, **size)
    first, _ = stepper(base, 1e-3)
    for _ in range(warm):
        first(next(batches))
    base.zero_grad(set_to_none=True)
    start = evaluate(base.eval(), held_out)["loss"]
    models = {method: prepared(base, method) for method in METHODS}
    runs = {method: stepper(model, RATES.get(method, 5e-3 if quick else 2e-3)) for method, model in models.items()}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks: dict[str, int] = {}
    for number in range(steps):
        batch = next(batches)
        for method, (step, optimizer) in runs.items():
            if number == 1:  # the optimizer's state is there
                optimizer.zero_grad()
                with TensorMemory() as memory:
                    step(batch)
                peaks[method] = memory.peak
                continue
            started = time.process_time()
            step(batch)
            seconds[method].append(time.process_time() - started)
    medians = {method: median(values[1:]) for method, values in seconds.items()}
    table = []
    for method, model in models.items():
        stays = kept(model, runs[method][1])
        table.append(
            {
                "method": method,
                "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "step, ms": f"{medians[method] * 1000:.0f}",
                "relative to LoRA": f"{medians[method] / medians['LoRA']:.2f}x",
                "weights and optimizer, MB": f"{stays / 1e6:.1f}",
                "peak tensor memory, MB": f"{(stays + peaks[method]) / 1e6:.1f}",
                "held-out loss": f"{evaluate(model.eval(), held_out)['loss']:.4f} (before: {start:.4f})",
            }
        )
    if quick:
        for row in table:
            print(" | ".join(str(value) for value in row.values()))
        return
    share = medians["QLoRA nf4"] / medians["LoRA"]
    memory_of = {row["method"]: float(row["peak tensor memory, MB"]) for row in table}
    claims = [
        Claim("time of a QLoRA step (nf4) relative to a LoRA step", "<= 1.35x", f"{share:.2f}x", share <= 1.35),
        Claim(
            "peak tensor memory: QLoRA < LoRA < full fine-tuning",
            "in this order",
            " < ".join(f"{memory_of[m]:.0f} MB" for m in ("QLoRA nf4", "LoRA", "full fine-tuning")),
            memory_of["QLoRA nf4"] < memory_of["LoRA"] < memory_of["full fine-tuning"],
        ),
    ]
    finish("qlora", table, claims, [0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
