"""Skip optimizer steps with a non-finite loss or gradient, and stop training after too many of them."""

from __future__ import annotations

import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.modules import FakeQuantize
from qatkit.tasks.inputs import InputCheck


class NonFiniteSteps(Callback):
    """Skip optimizer steps with a non-finite loss or gradient, on all processes at once.

    A bad batch then costs one step instead of making every weight NaN. A warning identifies the first skipped step and,
    if its data contains non-finite values, the batch and the tensor. Another warning at the end of training reports the
    number of skipped steps. With ``precision="16-mixed"``, gradients are not checked: the gradient scaler causes
    overflows by design and skips those steps itself. Place this callback before all callbacks that read gradients.

    Args:
        limit: Number of consecutive bad steps after which training stops.

    Raises:
        QatkitError: `limit` was reached. The error lists the step, the last checkpoint and any non-finite weight; the
            skipped steps did not change the weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import NonFiniteSteps
        >>> trainer = Trainer(callbacks=[NonFiniteSteps(limit=10)])
    """

    def __init__(self, limit: int = 10) -> None:
        if limit < 1:
            raise QatkitError(f"{limit} is out of range", key="limit", advice="use a positive integer")
        self.limit = limit
        self.skipped = 0
        """Number of steps skipped since training started or was resumed."""
        self._inputs = InputCheck()  # of the batches of this step
        self.in_a_row = 0
        # whether a loss of this step was non-finite; kept on the device to avoid a sync per batch
        self._bad: Tensor | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._inputs.add(batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._bad = self._bad, None
        inputs, self._inputs = self._inputs, InputCheck()
        of_loss = losses is not None and bool(losses)
        bad = trainer.strategy.reduce_boolean_decision(of_loss or self._in_gradients(trainer, optimizer), all=False)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # optimizers skip parameters without a gradient, including their decay
        self.skipped += 1
        what, cause = "loss" if of_loss else "gradient", inputs.found()
        if self.skipped == 1 and (trainer.is_global_zero or cause is not None):
            _warn(
                f"step {trainer.global_step + 1} was skipped because its {what} was non-finite"
                + (f": {cause}; remove the non-finite samples from the data" if cause else "")
            )
        if self.in_a_row >= self.limit:
            self._stop(trainer, pl_module, what if cause is None else f"{what} ({cause})")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skipped, self._inputs = 0, InputCheck()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skipped > 1 and trainer.is_global_zero:
            _warn(
                f"{self.skipped} steps up to step {trainer.global_step} were skipped because their loss or gradient "
                "was non-finite"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]

    def _in_gradients(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return False
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        # the largest magnitude keeps NaN and infinity, and cannot overflow
        return not bool(torch.nn.utils.get_total_norm(local, norm_type=torch.inf).isfinite())

    def _stop(self, trainer: Trainer, module: nn.Module, what: str) -> None:
        kept: Any = trainer.checkpoint_callback
        path = getattr(kept, "best_model_path", "")
        weight = non_finite_anywhere(trainer, module)
        weights = "no weight changed in these steps"
        if weight is not None:
            weights = f"{weight} was already non-finite before these steps"
        checkpoint = f"training continues from the last checkpoint, {path}"
        if not Path(path).is_file():
            checkpoint = "there is no checkpoint yet"
        elif weight is not None and not isinstance(kept, FiniteCheckpoint):
            checkpoint = f"the last checkpoint, {path}, may contain non-finite weights too; resume from an earlier one"
        raise QatkitError(
            f"the {what} was non-finite in {self.limit} consecutive steps, up to step {trainer.global_step + 1} "
            f"({weights}; {checkpoint})",
            key="training",
            advice="try a smaller lr, a warmup, gradient_clip: 1.0 or bf16-mixed instead of 16-mixed, and check the "
            "data for invalid records",
        )


def _warn(problem: str) -> None:
    # a caller in Lightning would be silenced together with Lightning's own warnings
    warnings.warn(f"training: {problem}", QatkitWarning, stacklevel=1)


class FiniteCheckpoint(ModelCheckpoint):
    """Save a checkpoint at the end of an epoch, unless training could not resume from it.

    Args:
        steps: The `NonFiniteSteps` callback. No checkpoint is saved while it skips steps or while a weight is
            non-finite; the step that made the weight non-finite may have had a finite loss.
        **options: Options of `ModelCheckpoint`.
    """

    def __init__(self, steps: NonFiniteSteps, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def may_save(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether training could resume from a checkpoint saved now. Must be called on all processes."""
        return self.steps.in_a_row == 0 and non_finite_anywhere(trainer, pl_module) is None

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.may_save(trainer, pl_module):  # equal on every process; all of them take part in saving
            super().on_train_epoch_end(trainer, pl_module)


def non_finite_anywhere(trainer: Trainer, module: nn.Module) -> str | None:
    """Describe the first non-finite tensor on any process; see `non_finite`. Must be called on all processes."""
    tensor = non_finite(module)
    if not trainer.strategy.reduce_boolean_decision(tensor is not None, all=False):
        return None
    return tensor or "a weight on another rank"


def non_finite(module: nn.Module) -> str | None:
    """Describe the first non-finite parameter, or the first buffer with NaN. Inf is allowed in buffers, which may be
    masks.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> non_finite(layer)
        >>> _ = nn.init.constant_(layer.weight, torch.inf)
        >>> non_finite(nn.Sequential(layer))
        "'weight' of layer '0'"
    """
    for layer, part in module.named_modules():
        if isinstance(part, FakeQuantize) and not part.ready:
            continue  # NaN marks scales that are not calibrated yet
        for own, value in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)):
            local = value.to_local() if isinstance(value, DTensor) else value
            if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided:
                continue  # codes of another library, sparse tensors, or a lazy layer that never ran
            if not local.is_floating_point() or local.element_size() == 1:  # 8-bit codes
                continue
            bad = ~local.isfinite() if isinstance(value, nn.Parameter) else local.isnan()
            if bool(bad.any()):
                return f"'{own}' of layer '{layer}'" if layer else f"'{own}'"
    return None
