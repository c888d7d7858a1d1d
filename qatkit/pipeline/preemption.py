"""SIGTERM handling during training: all processes agree on a step, save a checkpoint there, and end.

Lightning's own signal handler is replaced for two reasons. It calls collectives, which deadlocks if another process is
already in a collective, and it lets processes leave the training loop at different steps. Lightning's flag
`received_sigterm` is still used: the loops then raise `SIGTERMException` after the metrics of the step are logged.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor, distributed
from typing_extensions import override

from qatkit.callbacks.non_finite import FiniteCheckpoint
from qatkit.common.termination import Termination


class Preemption(Callback):
    """Save ``last.ckpt`` at the next optimizer step after SIGTERM, and end training there on all processes.

    At the end of an epoch, `checkpoint` saves the state. In the middle of an epoch, the state also contains the random
    state of each process, and no checkpoint is saved if a data loader cannot resume there. Place this callback after
    all callbacks that change weights.

    Args:
        termination: Reports whether this process has received the signal; None only restores the random state.
        checkpoint: The callback that saves at the end of an epoch.
    """

    def __init__(self, termination: Termination | None, checkpoint: FiniteCheckpoint) -> None:
        self.termination = termination
        self.checkpoint = checkpoint
        self._states: list[dict[str, Tensor]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._states:
            _set_random_state(trainer, self._states[trainer.global_rank])
            self._states = []
        if self.termination is not None:
            self.termination.defer(True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop._is_training_done or not self._agreed(trainer):
            return
        loaders = trainer.fit_loop._combined_loader
        assert loaders is not None
        fixed = [type(loader).__name__ for loader in loaders.flattened if not isinstance(loader, _Stateful)]
        if fixed:
            self._leave(trainer, f"{fixed[0]} has no state_dict(), so no checkpoint was saved within the epoch")
        elif self.checkpoint.may_save(trainer, pl_module):
            assert self.checkpoint.dirpath is not None
            assert self.termination is not None
            with self.termination.saving():
                self._states = _random_states(trainer)
                trainer.save_checkpoint(Path(self.checkpoint.dirpath) / "last.ckpt")
                self._states = []
            self._leave(trainer, f"a checkpoint was saved at step {trainer.global_step}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreed(trainer):
            self._leave(trainer, f"an epoch ended at step {trainer.global_step}")

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any process has received the signal; all processes must call it."""
        if self.termination is None:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.termination.received, all=False))

    def _leave(self, trainer: Trainer, done: str) -> None:
        """Let the loops of all processes end."""
        assert self.termination is not None
        if not self.termination.received:
            signal.raise_signal(signal.SIGTERM)  # only another process has received it
        self.termination.saved = done
        self.termination.release_children()
        trainer.strategy.barrier("SIGTERM")
        trainer._signal_connector.received_sigterm = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"random": self._states} if self._states else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = state_dict.get("random", [])


class Signals(_SignalConnector):
    """Leaves SIGTERM to the previously installed handler."""

    @override
    def _sigterm_notifier_fn(self, signum: Any, _: Any) -> None:
        pass


def hand_over(trainer: Trainer, termination: Termination) -> None:
    """Let `termination` handle SIGTERM; it also ends the processes that the Trainer starts."""
    trainer._signal_connector = Signals(trainer)
    launcher: Any = trainer.strategy.launcher
    if hasattr(launcher, "procs"):
        termination.children.append(lambda: launcher.procs)


def _random_states(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The states of torch's generators on every process."""
    device, own = trainer.strategy.root_device, {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        own[device.type] = torch.get_device_module(device).get_rng_state(device)
    if trainer.world_size == 1:
        return [own]
    states: list[dict[str, Tensor]] = [{} for _ in range(trainer.world_size)]
    distributed.all_gather_object(states, own)
    return states


def _set_random_state(trainer: Trainer, state: dict[str, Tensor]) -> None:
    device = trainer.strategy.root_device
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)
