"""The LightningModule that the pipeline trains: a model, its loss, its optimizer and how it is sharded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from typing_extensions import override

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize
from qatkit.recipe import ScheduleName, StageConfig
from qatkit.stages.optimizers import build_optimizer, learned_scales
from qatkit.tasks import Scores, Task, answers, model_inputs, task_of, to_logits, token_loss

SCALE_LR = 0.2
"""Learned scales move at this share of the learning rate: a step of Adam is as large as the learning rate whatever the
gradient, and scales are several times smaller than weights."""


class CompressionModule(LightningModule):
    """A classifier, a language model or an encoder in one stage of a recipe; see `qatkit.tasks`.

    The loss is cross-entropy. That of a text is the mean over all tokens of an optimizer step, however they are shared
    out among processes and accumulated batches; see `TokenWeighting`.

    Args:
        model: The model to train.
        stage: Learning rate, schedule and length.
        seed: Random numbers of an epoch depend on it, the epoch and the rank alone, so that a resumed run repeats them.
        compiled: Whether the model is compiled, once it is prepared and sharded.
        task: The task that the data declare; without one the batches decide, see `qatkit.tasks.task_of`.
    """

    def __init__(
        self, model: nn.Module, stage: StageConfig, seed: int, compiled: bool = False, task: Task | None = None
    ) -> None:
        super().__init__()
        self.model = model.train()  # from_pretrained gives models that evaluate, and Lightning leaves them so
        self.stage = stage
        self.seed = seed
        self.compiled = compiled
        self.task = task
        self._weighting = TokenWeighting()
        self._scores = Scores(self.task)
        self._labels: Tensor | None = None  # that counted in this epoch

    @override
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            parallelize(self.model, self.device_mesh)
        if self.compiled:
            self.model.compile(options=exact_division())  # in place: names of parameters stay as they are

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a whole batch may come as keywords; given the labels, models of transformers compute a loss of their own
        return self.model(*args, **model_inputs(kwargs)[1])

    @override
    def on_train_epoch_start(self) -> None:
        torch.manual_seed(hash((self.seed, self.current_epoch, self.global_rank)) % 2**63)
        # Lightning 2.6 counts one epoch too far after resuming from a checkpoint of an epoch's end, and would shuffle
        # otherwise than the uninterrupted run does; the data are only read after this hook
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.current_epoch)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        args, kwargs = model_inputs(batch)
        output = self(*args, **kwargs)
        per_token = task_of(batch, self.task).per_token
        if per_token and getattr(output, "logits", output) is None:  # a callback made the loss without them
            loss: Tensor = output.loss
            count: Tensor | None = (batch["labels"][:, 1:] != IGNORED).sum()
        else:
            logits, labels = answers(to_logits(output), batch, self.task)
            loss, count = token_loss(logits, labels) if per_token else (F.cross_entropy(logits, labels), None)
        if count is not None:
            self._labels = count if self._labels is None else self._labels + count
            first = batch_idx % self.trainer.accumulate_grad_batches == 0
            self._weighting.add(count, first, self._mean_over_processes)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # here, so that what a callback added to the loss is weighted with it
        super().backward(self._weighting.weighted(loss), *args, **kwargs)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated > 1:
            self._weighting.correct(self.parameters(), accumulated, self._mean_over_processes)

    @override
    def on_train_epoch_end(self) -> None:
        labels, self._labels = self._labels, None
        # the same on every process, so that all of them stop
        if labels is not None and self._mean_over_processes(labels.float()) == 0:
            raise QatkitError(
                f"data: every label of an epoch was {IGNORED}, so nothing is learned; give labels to the tokens to be "
                "learned"
            )

    @override
    def on_validation_epoch_start(self) -> None:
        self._scores = Scores(self.task)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self._logits(batch)
        if "loss" in task_of(batch, self.task).metrics:
            self._scores.add(logits, batch)
            return
        logits, labels = answers(logits, batch, self.task)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        values = {"val/loss": F.cross_entropy(logits, labels), "val/accuracy": accuracy}
        self.log_dict(values, prog_bar=True, batch_size=len(labels), sync_dist=True)

    @override
    def on_validation_epoch_end(self) -> None:
        if self._scores.count == 0:
            return
        sums = self._scores.sums().to(self.device, torch.float32)
        values = self._scores.replaced(self._mean_over_processes(sums)).metrics()
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True)

    @override
    def configure_optimizers(self) -> Any:
        stage = self.stage
        groups = parameter_groups(self.model, stage.lr, stage.weight_decay)
        optimizer = build_optimizer(stage.optimizer, self.model, groups)
        start, steps = stage.part.start if stage.part else 0, max(stage.schedule_steps, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor((start + step) / steps, stage.schedule, stage.warmup, stage.decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _logits(self, batch: Any) -> Tensor:
        args, kwargs = model_inputs(batch)
        return to_logits(self(*args, **kwargs))

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(values, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced


class TokenWeighting:
    """Makes the mean over all tokens of an optimizer step out of the means over the tokens of its batches.

    Lightning averages the losses of accumulated batches, and the gradients of processes, as if every batch held as many
    labels as any other. So each batch's loss is weighted with its number of labels over a reference, the mean over the
    processes' first batches of the step; with accumulation, where that is only known at the end, the gradients are then
    divided by what the batches turned out to hold. Without accumulation on one process every weight is 1.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._reference: Tensor | None = None
        self._seen: Tensor | None = None

    def add(self, count: Tensor, first: bool, mean: Callable[[Tensor], Tensor]) -> None:
        """Before a batch's backward.

        Args:
            count: Labels that count in the batch, 0-d.
            first: Whether the batch is the first of an optimizer step.
            mean: Mean of a tensor over all processes.
        """
        count = count.float()
        if first or self._reference is None or self._seen is None:
            self._reference = mean(count.clone()).clamp(min=1)
            self._seen = torch.zeros_like(count)
        self._seen = self._seen + count
        self._weight = count / self._reference

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss of the batch that was added last; other losses are left as they are."""
        weight, self._weight = self._weight, None
        return loss if weight is None else loss * weight

    @torch.no_grad()
    def correct(self, parameters: Iterable[nn.Parameter], batches: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Before the optimizer step: divide the gradients by what the batches held.

        Args:
            parameters: Those with gradients, which Lightning has divided by `batches`.
            batches: Batches per optimizer step; the last step of an epoch may have seen fewer.
            mean: Mean of a tensor over all processes.
        """
        if self._reference is None or self._seen is None:
            return
        factor = batches * self._reference / mean(self._seen).clamp(min=1)
        for parameter in parameters:
            if (grad := parameter.grad) is not None:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.mul_(factor)
        self._reference = self._seen = None


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices with weight decay, vectors without, learned scales without and slower.

    Example:
        >>> groups = parameter_groups(nn.Linear(4, 2), lr=1e-3, weight_decay=0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (1, 0.0)]
    """
    scales = learned_scales(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter for parameter in trained if id(parameter) not in scales]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in scales], "lr": lr * SCALE_LR, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(progress: float, schedule: ScheduleName, warmup: float = 0.0, decay: float = 0.2) -> float:
    """Share of the peak learning rate at a point of the stage.

    Args:
        progress: How much of the stage is done, 0 to 1.
        schedule: What follows the warm-up: half a cosine to 0, a line to 0, the peak, or ("wsd") the peak and then
            ``1 - sqrt(share of the decay that is done)``; Hägele et al. (2024), "Scaling Laws and Compute-Optimal
            Training Beyond Fixed Training Durations", equation 1.
        warmup: Share of the stage over which the rate rises from 0.
        decay: Share of the stage over which "wsd" falls to 0, at its end.

    Example:
        >>> lr_factor(0.5, "cosine")
        0.5
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "wsd":
        fallen = 1 - (1 - min(progress, 1.0)) / decay
        return 1 - math.sqrt(fallen) if fallen > 0 else 1.0
    rest = min((progress - warmup) / (1 - warmup), 1.0) if warmup < 1 else 1.0
    if schedule == "cosine":
        return round(0.5 * (1 + math.cos(math.pi * rest)), 12)
    return 1 - rest if schedule == "linear" else 1.0


def exact_division() -> dict[str, bool] | None:
    """The compiler's option to divide as torch does, for GPUs: Triton's own division is off in the last bit.

    Codes that training computed would differ from those of the file where a quotient lies between two.
    """
    name = "eager_numerics.division_rounding"  # from torch 2.11 on
    return {name: True} if name in torch._inductor.list_options() else None


def parallelize(model: nn.Module, mesh: Any) -> None:
    """Shard a model's parameters over the data-parallel processes with FSDP2, in place.

    Fake quantizers are in the model by now (callbacks swap in `setup`), so their scales are sharded with the weights.
    What is trained in another dtype than the rest, such as the head of a classifier beside adapters, is gathered apart.

    Raises:
        QatkitError: a fake quantizer is trained in another dtype.
    """
    from torch.distributed.fsdp import fully_shard

    dtypes = Counter(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    usual = {dtype for dtype, _ in dtypes.most_common(1)}
    for name, module in model.named_modules():
        trained = {p.dtype for p in module.parameters(recurse=False) if p.requires_grad}
        if trained <= usual:
            continue
        if any(isinstance(part, FakeQuantize) for part in module.modules()):
            found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise QatkitError(
                f"trainer.strategy: FSDP2 gathers what is of one dtype, and '{name}' trains beside others in "
                f"{found}; write strategy: ddp, or model.args.dtype: float32"
            )
        fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
