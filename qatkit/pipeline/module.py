"""The LightningModule that the pipeline trains: a model with its loss and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.pipeline.learning_rate import lr_factor, parameter_groups
from qatkit.pipeline.sharding import exact_division, parallelize, share_buffers
from qatkit.pipeline.token_weighting import TokenWeighting
from qatkit.recipe import StageConfig
from qatkit.stages.optimizers import build_optimizer
from qatkit.tasks import InputCheck, Scores, Task, answers, model_inputs, row_loss, task_of, to_logits
from qatkit.tasks.detection import own_loss


class CompressionModule(LightningModule):
    """A model of any task in one stage of a recipe; see `qatkit.tasks`.

    The loss is `qatkit.tasks.row_loss`. For text, it is the mean over all tokens of an optimizer step, regardless of
    how they are split over processes and accumulated batches; see `TokenWeighting`.

    Args:
        model: The model to train.
        stage: Learning rate, schedule and length.
        seed: Determines the random numbers of an epoch, together with the epoch and the rank, so that a resumed run
            repeats them.
        compiled: Whether to compile the model after it has been prepared and sharded.
        task: The task that the data declares. By default, it is inferred from the batches; see `qatkit.tasks.task_of`.
    """

    def __init__(
        self, model: nn.Module, stage: StageConfig, seed: int, compiled: bool = False, task: Task | None = None
    ) -> None:
        super().__init__()
        self.model = model.train()  # from_pretrained returns models in eval mode, and Lightning keeps the mode
        self.stage = stage
        self.seed = seed
        self.compiled = compiled
        self.task = task
        self._weighting = TokenWeighting()
        self._scores = Scores(self.task)
        self._inputs: InputCheck | None = InputCheck()  # of the first validation; all of them read the same data
        self._labels: Tensor | None = None  # the number that counted in this epoch

    @override
    def configure_model(self) -> None:
        if self.device_mesh is not None:
            parallelize(self.model, self.device_mesh)
        if self.compiled:
            self.model.compile(options=exact_division())  # in place: parameter names stay the same

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a whole batch may come as keywords; transformers models compute their own loss if they get the labels
        return self.model(*args, **model_inputs(kwargs)[1])

    @override
    def on_train_epoch_start(self) -> None:
        torch.manual_seed(hash((self.seed, self.current_epoch, self.global_rank)) % 2**63)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        task = task_of(batch, self.task)
        if task.kind == "boxes":
            loss = own_loss(self.model, batch)[1]
            self.log("train/loss", loss.detach(), prog_bar=True)
            return loss
        args, kwargs = model_inputs(batch)
        output = self(*args, **kwargs)
        if task.next_token and getattr(output, "logits", output) is None:  # a callback computed the loss without them
            loss = output.loss
            count = (batch["labels"][:, 1:] != IGNORED).sum()
        else:
            loss, count = row_loss(*answers(to_logits(output), batch, self.task), task)
        if task.per_token:
            self._labels = count if self._labels is None else self._labels + count
            first = batch_idx % self.trainer.accumulate_grad_batches == 0
            self._weighting.add(count, first, self._mean_over_processes)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # here, so that terms that callbacks added to the loss are weighted with it
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
                f"every label in an epoch was {IGNORED}, so the model learns nothing",
                key="data",
                advice="label the tokens that the model should learn",
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["labels"] = None if self._labels is None else int(self._labels)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (labels := checkpoint.get("labels")) is not None:  # saved in the middle of an epoch
            self._labels = torch.tensor(labels, device=self.device)

    @override
    def on_validation_epoch_start(self) -> None:
        if self.device_mesh is not None:
            share_buffers(self.model)
        self._scores = Scores(self.task)
        self._inputs = InputCheck() if self._inputs is not None else None

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self._inputs is not None:
            self._inputs.add(batch)
        self._scores.add(self._logits(batch), batch)

    @override
    def on_validation_epoch_end(self) -> None:
        if self._inputs is not None and self.trainer.is_global_zero:
            self._inputs.warn("validation")
        self._inputs = None
        if self._scores.count == 0:
            return
        self._scores.reduce(self._mean_over_processes, self.trainer.world_size, self.device)
        self.log_dict({f"val/{name}": value for name, value in self._scores.metrics().items()}, prog_bar=True)

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
