"""Steps whose loss or gradient is NaN or infinite change nothing, and too many of them in a row end training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.errors import QatkitError


class NonFiniteSteps(Callback):
    """Leaves out optimizer steps whose loss or gradient is NaN or infinite, on all processes alike.

    One bad batch then costs its step; otherwise it would cost every weight. Gradients are not looked at with
    ``precision="16-mixed"``: its scaler overflows on purpose, and leaves these steps out by itself. Put it before
    callbacks that read gradients.

    Args:
        limit: Bad steps in a row that end training.

    Raises:
        QatkitError: there were so many; it names the step, and the last checkpoint, which no bad step has changed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import NonFiniteSteps
        >>> trainer = Trainer(callbacks=[NonFiniteSteps(limit=10)])
    """

    def __init__(self, limit: int = 10) -> None:
        if limit < 1:
            raise QatkitError(f"limit: {limit} is out of range; write a whole number of at least 1")
        self.limit = limit
        self.in_a_row = 0
        self._bad: Tensor | None = (
            None  # one of the losses of this step was; on the device, not to wait for every batch
        )

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite().all()
        self._bad = bad if self._bad is None else self._bad | bad

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._bad = self._bad, None
        of_loss = losses is not None and bool(losses)
        bad = trainer.strategy.reduce_boolean_decision(of_loss or self._in_gradients(trainer, optimizer), all=False)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if not bad:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # an optimizer does nothing to a parameter without one, not even decay
        if self.in_a_row >= self.limit:
            self._stop(trainer, "loss" if of_loss else "gradient")

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
        # the largest magnitude: NaN and infinity come through it, and nothing that is finite becomes infinite in it
        return not bool(torch.nn.utils.get_total_norm(local, norm_type=torch.inf).isfinite())

    def _stop(self, trainer: Trainer, what: str) -> None:
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        kept = f"Training continues from the last checkpoint, {path}"
        if not Path(path).is_file():
            kept = "No checkpoint was written before"
        raise QatkitError(
            f"training: the {what} was NaN or infinite in {self.limit} steps in a row, up to step "
            f"{trainer.global_step + 1}; they changed no weight. {kept}. Try a smaller lr, a warmup, "
            "gradient_clip: 1.0 or bf16-mixed in place of 16-mixed, and look for bad records in the data"
        )
