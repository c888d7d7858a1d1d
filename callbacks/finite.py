"""Steps whose loss or gradient is NaN or infinite change nothing, and too many of them in a row end training."""

from __future__ import annotations

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

from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize


class NonFiniteSteps(Callback):
    """Leaves out optimizer steps whose loss or gradient is NaN or infinite, on all processes alike.

    One bad batch then costs its step; otherwise it would cost every weight. Gradients are not looked at with
    ``precision="16-mixed"``: its scaler overflows on purpose, and leaves these steps out by itself. Put it before
    callbacks that read gradients.

    Args:
        limit: Bad steps in a row that end training.

    Raises:
        QatkitError: there were so many; it names the step, the last checkpoint, and what is not finite in the weights,
            which the bad steps themselves have not changed.

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
            self._stop(trainer, pl_module, "loss" if of_loss else "gradient")

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

    def _stop(self, trainer: Trainer, module: nn.Module, what: str) -> None:
        kept: Any = trainer.checkpoint_callback
        path = getattr(kept, "best_model_path", "")
        spoiled = spoiled_by(trainer, module)
        said = "they changed no weight"
        if spoiled is not None:
            said = f"{spoiled} was NaN or infinite before them already, by a step, perhaps, whose own loss was a number"
        advice = f"Training continues from the last checkpoint, {path}"
        if not Path(path).is_file():
            advice = "No checkpoint was written before"
        elif spoiled is not None and not isinstance(kept, FiniteCheckpoint):
            advice = f"The last checkpoint, {path}, may hold it too: go on from an earlier one"
        raise QatkitError(
            f"training: the {what} was NaN or infinite in {self.limit} steps in a row, up to step "
            f"{trainer.global_step + 1}; {said}. {advice}. Try a smaller lr, a warmup, "
            "gradient_clip: 1.0 or bf16-mixed in place of 16-mixed, and look for bad records in the data"
        )


class FiniteCheckpoint(ModelCheckpoint):
    """A checkpoint of epochs' ends that is only replaced by one that training can go on from.

    Args:
        steps: Within its bad steps nothing is saved, and nothing while a weight is NaN or infinite: the step that made
            it so may have had a good loss.
        **options: Of `ModelCheckpoint`.
    """

    def __init__(self, steps: NonFiniteSteps, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # both are the same on every process, which all have to take part in saving
        if self.steps.in_a_row == 0 and spoiled_by(trainer, pl_module) is None:
            super().on_train_epoch_end(trainer, pl_module)


def spoiled_by(trainer: Trainer, module: nn.Module) -> str | None:
    """What of a model holds NaN or infinity on any process, as `spoiled` says it; called on all of them."""
    found = spoiled(module)
    if not trainer.strategy.reduce_boolean_decision(found is not None, all=False):
        return None
    return found or "a weight on another process"


def spoiled(module: nn.Module) -> str | None:
    """The first parameter that is not finite, or buffer with a NaN, in words; infinity in a buffer may be a mask.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> spoiled(layer)
        >>> _ = nn.init.constant_(layer.weight, torch.inf)
        >>> spoiled(nn.Sequential(layer))
        "'weight' of layer '0'"
    """
    for layer, part in module.named_modules():
        if isinstance(part, FakeQuantize) and not part.ready:
            continue  # not calibrated yet, which NaN says
        for own, value in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)):
            local = value.to_local() if isinstance(value, DTensor) else value
            if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided:
                continue  # codes of another library, sparse, or of a lazy layer that never ran
            if not local.is_floating_point() or local.element_size() == 1:  # codes of 8 bits
                continue
            bad = ~local.isfinite() if isinstance(value, nn.Parameter) else local.isnan()
            if bool(bad.any()):
                return f"'{own}' of layer '{layer}'" if layer else f"'{own}'"
    return None
