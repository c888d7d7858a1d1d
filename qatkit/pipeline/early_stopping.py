"""Early stopping of a stage, with Lightning's callback extended to save and restore the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.recipe import EarlyStoppingConfig
from qatkit.run.checkpoint import load_checkpoint
from qatkit.run.record import EarlyStopped

MONITORED = "val/loss"


class StopEarly(EarlyStopping):
    """End a stage when the validation loss stops improving, and restore the best weights.

    Args:
        config: The recipe's ``early_stopping`` block.
        stage: The stage, for errors.
        folder: The folder for ``best.ckpt``.

    Raises:
        QatkitError: the stage is never validated, or no validation loss was finite.
    """

    def __init__(self, config: EarlyStoppingConfig, stage: str, folder: Path) -> None:
        # checked after validations only: max_steps may cut off an epoch, whose metric is that of the epoch before
        super().__init__(
            MONITORED, config.min_delta, config.patience, check_finite=False, check_on_train_epoch_end=False
        )
        self.key = f"stages.{stage}.early_stopping"
        self.path = folder / "best.ckpt"
        self.best_step = 0

    @property
    def stopped(self) -> bool:
        """Whether early stopping ended the stage."""
        return self.wait_count >= self.patience

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best_step = state_dict["best_step"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if sum(trainer.num_val_batches) == 0:
            raise QatkitError(
                "the data has no validation batches",
                key=self.key,
                advice="add a validation split, or remove early_stopping",
            )
        epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        if epoch > trainer.max_steps:
            raise QatkitError(
                f"the first validation is at the end of an epoch of {epoch} steps, but max_steps is "
                f"{trainer.max_steps}",
                key=self.key,
                advice="use more steps, or shorter epochs (epoch_batches for text data)",
            )
        # a run that was killed between the decision and the end of the stage must not train further
        trainer.should_stop = trainer.should_stop or self.stopped

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_score
        super().on_validation_end(trainer, pl_module)
        if self.best_score is not before:
            self.best_step = trainer.global_step
            trainer.save_checkpoint(self.path, weights_only=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best_score.isinf():
            raise QatkitError(
                f"{MONITORED} was non-finite in every validation run", key=self.key, advice="use a smaller lr"
            )
        state = load_checkpoint(self.path)["state_dict"]
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            set_model_state_dict(pl_module, state, options=StateDictOptions(full_state_dict=True))
        else:
            pl_module.load_state_dict(state)

    def record(self, trainer: Trainer) -> EarlyStopped:
        """The early-stopping entry in the stage's record."""
        return {
            "stopped": self.stopped,
            "steps": trainer.global_step,
            "best_step": self.best_step,
            "val/loss": float(self.best_score),
        }
