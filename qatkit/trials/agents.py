"""A sweep for the agents of Weights & Biases, which run `qatkit run` themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.recipe.strict_yaml import dump_yaml
from qatkit.trials.grid import value_text

_COMMAND = 'exec qatkit run "$@" --out "runs/$WANDB_SWEEP_ID/$WANDB_RUN_ID"'


def agent_sweep(
    name: str,
    recipe: str,
    fixed: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    random_count: int | None,
    allow: Sequence[str] = (),
) -> str:
    """Return the configuration of a sweep for ``wandb sweep FILE``.

    Args:
        name: The name of the sweep.
        recipe: Name or path of the recipe.
        fixed: Overrides of all configurations.
        grid: Values by key.
        random_count: Number of random configurations; None runs all.
        allow: Packages whose code the recipe may use.
    """
    allowed = [part for package in allow for part in ("--allow", package)]
    arguments = [recipe, *fixed, "trainer.logger=wandb", *allowed]
    method: dict[str, Any] = (
        {"method": "grid"} if random_count is None else {"method": "random", "run_cap": random_count}
    )
    return dump_yaml(
        {
            "name": name,
            **method,
            "parameters": {key: {"values": list(map(_value, values))} for key, values in grid.items()},
            "command": ["bash", "-c", _COMMAND, "qatkit", *arguments, "${args_no_hyphens}"],
        }
    )


def _value(value: Any) -> Any:
    """A value that an agent inserts into the command line as the YAML of `qatkit run`.

    Agents insert ``str(value)`` after the value was JSON on a server. Only plain numbers survive this, so every other
    value is its YAML text already.
    """
    plain = type(value) is int or (type(value) is float and not value.is_integer() and math.isfinite(value))
    return value if plain else value_text(value)
