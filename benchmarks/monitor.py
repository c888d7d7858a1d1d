"""Measure the overhead of CompressionMonitor: alternating steps of one training run with it and without it.

Run: python benchmarks/monitor.py
Takes about a minute and a half.

Of 100 steps with a teacher, one ends with an observation and a comparison of student and teacher, nine only compare,
and ninety do neither. A training run alternates these kinds of steps with steps without the monitor, in an order that
is drawn for every four steps. The overhead of a kind is the median, over the turns, of its difference to the step
without the monitor in the same turn. The three are added in the proportion of the 100 steps.

An idle step costs the time in which Lightning calls one more callback, whatever the model: microseconds, which
disappear in the noise of a 40 ms step. It is therefore measured while training one small layer. All steps are
measured in CPU time on one thread, which other processes disturb less than wall time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import random
import tempfile
import time
import warnings
from statistics import median
from typing import Any, ClassVar

import torch
from harness import Claim, finish
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from qatkit.callbacks import CompressionMonitor, KnowledgeDistillation, QuantizationAwareTraining
from qatkit.callbacks.monitor import COMPARISONS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QuantSpec
from qatkit.models import cnn

WARM_UP = 40


class Block(nn.Module):
    """The linear layers of a transformer block: four for attention, two for the feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.down(F.gelu(self.up(x)))


class Classifier(LightningModule):
    """Cross-entropy and AdamW over any network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())
        self.log("train/loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Turns(Callback):
    """Decides before every step what the monitor does in it, and records the time of the step."""

    kinds: ClassVar = {"without": 0, "idle": 10**9, "comparing": 9, "observing": 1}
    """And the interval that makes the monitor do it."""

    def __init__(self, monitor: CompressionMonitor, teacher: KnowledgeDistillation) -> None:
        self.monitor, self.teacher = monitor, teacher
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        self.order: list[str] = []
        self.random = random.Random(0)
        self.watch: Any = None
        self.kind = ""
        self.started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if trainer.global_step > WARM_UP:
            self.seconds[self.kind].append(now - self.started)
        self.watch = self.watch or self.teacher.watch
        self.order = self.order or self.random.sample(list(self.kinds), len(self.kinds))
        self.kind = self.order.pop()
        if self.monitor in trainer.callbacks:
            trainer.callbacks.remove(self.monitor)
        if self.kind != "without":
            trainer.callbacks.append(self.monitor)
            self.monitor.every = self.kinds[self.kind]
            # as if the step that comes had been observed, unless it is to be
            self.monitor._seen = trainer.global_step + (self.kind != "observing")
        self.teacher.watch = None if self.kind == "without" else self.watch
        self.started = time.process_time()


def measure(net: nn.Module, batch: list[Tensor], turns: int) -> dict[str, float]:
    """The median of a step without the monitor and the overhead of each kind, in milliseconds."""
    monitor, teacher = CompressionMonitor(), KnowledgeDistillation(copy.deepcopy(net), student="net")
    assert (monitor.every, COMPARISONS) == (100, 10)  # what the proportions above are of
    quantization = QuantizationAwareTraining(
        QuantSpec(num_bits=4, observer="lsq"), QuantSpec(symmetric=False, strategy="tensor"), calibration_batches=1
    )
    clock = Turns(monitor, teacher)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=WARM_UP + 4 * turns + 1,
            callbacks=[clock, quantization, teacher, monitor],
            logger=CSVLogger(folder),
            log_every_n_steps=10**9,  # nothing but the monitor writes
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(net), DataLoader(list(itertools.repeat(batch, 10_000)), batch_size=None))
    without = clock.seconds["without"]
    adds = {
        kind: 1000 * median(own - other for own, other in zip(seconds, without, strict=True))
        for kind, seconds in clock.seconds.items()
    }
    return adds | {"without": 1000 * median(without)}


def main(turns: int) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(64, 288), Block(288), Block(288), nn.Linear(288, 100))
    idle = measure(nn.Linear(8, 2), [torch.randn(4, 8), torch.randint(2, (4,))], 10 * turns)["idle"]
    rows, claims = [], []
    for name, net, batch, share in (
        ("digits CNN, batch 64", cnn(), [torch.randn(64, 1, 8, 8), torch.randint(10, (64,))], 3),
        ("transformer-like stack, 64 tokens", stack, [torch.randn(4, 16, 64), torch.randint(100, (4, 16))], 1),
    ):
        parameters = sum(parameter.numel() for parameter in net.parameters())
        times = measure(net, batch, share * turns)
        added = (times["observing"] + 9 * times["comparing"] + 90 * idle) / (100 * times["without"])
        rows.append(
            {
                "model": name,
                "parameters": f"{parameters:,}",
                "ms per step": times["without"],
                "overhead of an observation, ms": times["observing"],
                "overhead of a comparison, ms": times["comparing"],
                "overhead of an idle step, ms": idle,
                "overhead of CompressionMonitor()": f"{100 * added:.2f}%",
            }
        )
        claims.append(Claim(f"overhead of CompressionMonitor(), {name}", "<= 1%", f"{100 * added:.2f}%", added <= 0.01))
    finish("monitor", rows, claims)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=200)
    main(parser.parse_args().turns)
