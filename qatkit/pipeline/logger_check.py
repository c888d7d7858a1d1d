"""Check that the package of a logger is installed, without importing it."""

from __future__ import annotations

from importlib.util import find_spec

from qatkit.errors import QatkitError
from qatkit.recipe import TrainerConfig


def check_logger(trainer: TrainerConfig) -> None:
    """Raise an error if the package of a logger is not installed.

    Raises:
        QatkitError: the package is missing; the error includes the command that installs it.
    """
    if trainer.logger != "csv" and find_spec(trainer.logger) is None:
        raise QatkitError(
            f"'{trainer.logger}' needs a package that is not installed",
            key="trainer.logger",
            advice=f"run `pip install {trainer.logger}`, or use csv",
        )
