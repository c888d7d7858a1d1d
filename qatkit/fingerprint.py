"""What a stage's result depends on, and a clear word when it has changed."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError
from qatkit.loading import flatten
from qatkit.recipe import FactoryConfig, Recipe

_TRAINER_KEYS = ("accelerator", "devices", "strategy", "precision", "compile")


def stage_inputs(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Dotted keys and values that the result of a stage depends on, apart from the stages before it.

    A model or data argument that is the path of an existing file counts with the file's content, not only its name.
    """
    inputs: dict[str, Any] = {"seed": recipe.seed}
    factories: dict[str, FactoryConfig] = {"model": recipe.model, "data": recipe.data}
    for key, config in factories.items():
        inputs |= flatten(config, f"{key}.")
    inputs |= {f"trainer.{key}": getattr(recipe.trainer, key) for key in _TRAINER_KEYS}
    # samples are to be read, and change nothing
    inputs |= flatten(dataclasses.replace(recipe.stages[stage], samples=None), f"stages.{stage}.")
    if (own := recipe.stages[stage].model) is not None:
        factories[f"stages.{stage}.model"] = own
    for key, config in factories.items():
        for name, path in _files(config.args, f"{key}.args"):
            inputs[f"{name} (content)"] = _sha256(path)
    return inputs


def fingerprint(inputs: dict[str, Any], parent: str | None, teacher: str | None = None) -> str:
    """A hash of a stage's inputs, chained to those of the stage before it and of the one that teaches it."""
    return hashlib.sha256(json.dumps([inputs, parent, teacher], sort_keys=True).encode()).hexdigest()


def changed_keys(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The keys that differ, each with what it was and what it is.

    Example:
        >>> changed_keys({"seed": 1}, {"seed": 2})
        ['seed: was 1, is now 2']
    """
    absent = "absent"
    return [
        f"{key}: was {recorded.get(key, absent)}, is now {current.get(key, absent)}"
        for key in dict.fromkeys([*recorded, *current])
        # as JSON: 1 and 1.0 and true are equal in Python, and different in a recipe
        if json.dumps(recorded.get(key, absent)) != json.dumps(current.get(key, absent))
    ]


def refuse_changes(stage: str, state: str, recorded: dict[str, Any], current: dict[str, Any], out: Path) -> None:
    """Raise unless the inputs are those that the stage was started with.

    Raises:
        QatkitError: names each changed key, what it was and what it is now.
    """
    # through JSON, as the record went: tuples are lists there
    changes = changed_keys(recorded, json.loads(json.dumps(current)))
    if changes:
        listed = "\n  ".join(changes[:10])
        raise QatkitError(
            f"stage '{stage}' in {out} was {state} with other values:\n  {listed}\n"
            f"write --force to run it and the stages after it again, or another --out"
        )


def _files(value: Any, name: str) -> Iterator[tuple[str, Path]]:
    """Paths of existing files anywhere in the arguments; a bare word such as ``train`` is no path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _files(part, f"{name}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _files(part, f"{name}[{index}]")
    elif isinstance(value, str) and any(sign in value for sign in "*?["):
        for found in sorted(glob.glob(value, recursive=True)):
            if Path(found).is_file():
                yield f"{name} {found}", Path(found)
    elif isinstance(value, str) and (Path(value).suffix or len(Path(value).parts) > 1):
        with suppress(OSError):  # too long for a name, or not ours to look at
            if Path(value).is_file():
                yield name, Path(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
