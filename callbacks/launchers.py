"""Check for strategies whose processes do not share the trained module with the user's process."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from qatkit.errors import QatkitError


def refuse_spawn(trainer: Trainer, callback: str) -> None:
    """Raise an error if the Trainer starts its processes with Python's `multiprocessing`.

    Such a process replaces layers in its own copy of the module. Lightning then loads the copy's weights into the
    original module with ``strict=False``, which drops adapters and scales without an error.

    Args:
        trainer: Any Trainer.
        callback: Name of the callback, for the error.

    Raises:
        QatkitError: the strategy is ddp_spawn, ddp_fork or ddp_notebook.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        names = {"spawn": "ddp_spawn", "fork": "ddp_fork or ddp_notebook", "forkserver": "ddp_forkserver"}
        raise QatkitError(
            f"{names.get(launcher._start_method, launcher._start_method)} trains a copy of the module, and Lightning "
            f"does not return the layers that {callback} changed",
            key="strategy",
            advice="use ddp, in a script rather than a notebook",
        )
