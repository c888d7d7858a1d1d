"""A sweep for the agents of Weights & Biases, which run `qatkit run` themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.recipe.strict_yaml import dump_yaml

_COMMAND = 'exec qatkit run "$@" --out "runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID"'


def agent_sweep(
    name: str, recipe: str, fixed: Sequence[str], grid: Mapping[str, Sequence[Any]], random_count: int | None
) -> str:
    """Return the configuration of a sweep for ``wandb sweep FILE``.

    Args:
        name: The name of the sweep.
        recipe: Name or path of the recipe.
        fixed: Overrides of all configurations.
        grid: Values by key.
        random_count: Number of random configurations; None runs all.
    """
    arguments = [recipe, *fixed, "trainer.logger=wandb"]
    method: dict[str, Any] = (
        {"method": "grid"} if random_count is None else {"method": "random", "run_cap": random_count}
    )
    return dump_yaml(
        {
            "name": name,
            **method,
            "parameters": {key: {"values": list(values)} for key, values in grid.items()},
            "command": ["bash", "-c", _COMMAND, "qatkit", *arguments, "${args_no_hyphens}"],
        }
    )
