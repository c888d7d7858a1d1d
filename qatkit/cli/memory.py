"""Print the memory prediction for `validate`, `run` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qatkit.cli.output import echo

if TYPE_CHECKING:
    from qatkit.recipe import Recipe


def print_training(recipe: Recipe, allow: Sequence[str], force: bool, quiet: bool = False) -> None:
    """Print the predicted memory use of every stage that trains.

    Args:
        recipe: The recipe.
        allow: Additional packages whose code the recipe may use.
        force: Accept stages that do not fit.
        quiet: Print nothing.

    Raises:
        QatkitError: a stage does not fit, unless `force`.
    """
    from qatkit.advise.fit import check_fit
    from qatkit.advise.plan import device_of, plan_recipe
    from qatkit.common.units import format_bytes

    plans = plan_recipe(recipe, allow)
    device = device_of(recipe.trainer)
    if plans and not quiet:
        processes = "1 process" if device.count == 1 else f"{device.count} processes"
        available = f", {format_bytes(device.memory)} available" if device.memory is not None else ""
        echo(f"Predicted peak memory per process ({processes} on {device.name}{available}):")
    for plan in plans if not quiet else ():
        memory = plan.memory
        parts = {
            "weights": memory.weights,
            "teacher": memory.teacher,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
        }
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        unknown = f"; activations are not predicted, because {plan.unknown}" if plan.unknown else ""
        trained = f"{memory.trained:,} of {memory.parameters:,} parameters trained"
        echo(f"  {plan.stage}: {format_bytes(plan.on_each)} ({trained}; {listed}{unknown})")
    if not force:
        check_fit(recipe, plans, allow)
