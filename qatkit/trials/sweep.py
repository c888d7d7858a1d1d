"""A sweep: the folder of its configurations, whose runs share equal stages.

SWEEP/sweep.yaml            the recipe without the values of the configurations
SWEEP/sweep.json            the configurations, in the order of their numbers
SWEEP/stages/NAME-PRINT/    a stage with its exports, by its fingerprint; computed once
SWEEP/runs/NUMBER/          recipe.yaml, the names of the shared stages, and the output of `qatkit run`
SWEEP/trials.log            the journal of Optuna
SWEEP/results.json          all results
SWEEP/report.html           the page
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from qatkit.common.files import write_atomically
from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError
from qatkit.pipeline.runner import stage_prints
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import is_verified
from qatkit.recipe import Recipe
from qatkit.recipe.loading import flatten, load_recipe, recipe_to_yaml
from qatkit.run.exports import exports_of
from qatkit.run.fingerprint import changed_keys
from qatkit.run.folder import Run
from qatkit.run.sharing import share_stages, shared_name
from qatkit.trials.grid import Configuration, identity, overrides

SCHEMA = 1
"""Version of ``sweep.json``."""


class _Sweep(TypedDict):
    """The content of ``sweep.json``."""

    configurations: list[dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep."""

    number: int
    """Counted from 1."""
    values: Configuration
    run: Run
    """Its run, whose stages are shared."""

    @property
    def unfinished(self) -> list[Path]:
        """The folders of stages that are not finished."""
        folders = [self.run.folder(stage) for stage in self.run.recipe.stages]
        return [folder for folder in folders if not (folder / "stage.json").is_file()]

    @property
    def is_finished(self) -> bool:
        """Whether all stages are finished, and all exports have been verified."""
        return not self.unfinished and all(is_verified(self.run, exported) for exported in exports_of(self.run))


def load_configurations(
    recipe: str | os.PathLike[str], fixed: Sequence[str], found: Sequence[Configuration], allow: Sequence[str] = ()
) -> list[Recipe]:
    """Load and validate the recipe of every configuration; nothing is trained.

    Args:
        recipe: Name or path.
        fixed: Overrides of all configurations.
        found: The configurations.
        allow: Packages whose code the recipe may use.

    Raises:
        QatkitError: a value is invalid, or a recipe has no ``export`` block; the error includes the key.
    """
    recipes = []
    for values in found:
        changed = overrides(values)
        loaded = load_recipe(recipe, [*fixed, *changed])
        try:
            validate_recipe(loaded, allow)
            if not loaded.exports:
                raise QatkitError(
                    "a sweep compares exported files, but the recipe has no such block",
                    key="export",
                    advice="add export: {format: onnx}",
                )
        except QatkitError as error:
            raise error.with_fields(origin=error.origin or f"with {' '.join(changed)}") from error.__cause__
        recipes.append(loaded)
    return recipes


def open_sweep(
    folder: Path, base: Recipe, found: Sequence[Configuration], recipes: Sequence[Recipe], allow: Sequence[str] = ()
) -> list[Trial]:
    """Add configurations to a sweep's folder, and return all trials in it. The caller must hold the folder's lock.

    Args:
        folder: The sweep's folder, which may contain configurations of the same recipe.
        base: The recipe without the values of the configurations.
        found: The configurations.
        recipes: The recipe of each configuration.
        allow: Packages whose code the recipe may use.

    Returns:
        The trials, in the order of their numbers: those of earlier commands first.

    Raises:
        QatkitError: the folder contains a sweep of another recipe, or something else.
    """
    path = folder / "sweep.json"
    content = read_signed(path, _Sweep, SCHEMA, "use another --out")
    kept: list[Configuration] = []
    if content is not None:
        changes = changed_keys(flatten(load_recipe(folder / "sweep.yaml")), flatten(base))
        if changes:
            listed = "\n  ".join(changes[:10])
            raise QatkitError(
                f"the folder contains a sweep of another recipe:\n  {listed}",
                key=str(folder),
                advice="use another --out",
            )
        kept = content["configurations"]
    elif any(entry.name not in ("run.lock", "sweep.yaml") for entry in folder.iterdir()):
        raise QatkitError("the folder is not empty, and contains no sweep", key=str(folder), advice="use another --out")
    known, given = {identity(values) for values in kept}, [identity(values) for values in found]
    all_values = [*kept, *(values for values, same in zip(found, given, strict=True) if same not in known)]
    write_atomically(folder / "sweep.yaml", recipe_to_yaml(base))
    write_signed(path, {"configurations": [dict(values) for values in all_values]}, SCHEMA)
    trials = []
    for number, values in enumerate(all_values, start=1):
        out = folder / "runs" / str(number)
        if (same := identity(values)) in given:
            recipe = dataclasses.replace(recipes[given.index(same)], name=f"{base.name}-{number}")
        else:
            recipe = load_recipe(out / "recipe.yaml")
        prints = stage_prints(Run(recipe, out, allow))
        share_stages(out, {stage: shared_name(stage, each.fingerprint) for stage, each in prints.items()})
        write_atomically(out / "recipe.yaml", recipe_to_yaml(recipe))
        trials.append(Trial(number, values, Run(recipe, out, allow)))
    return trials
