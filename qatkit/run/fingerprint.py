"""The inputs of a stage, their fingerprint, and the error that lists changed inputs."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qatkit.common.digests import listing_digest, sizes_digest
from qatkit.common.files import sha256_of
from qatkit.data.files import is_local, local_files
from qatkit.data.parts import named_files
from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig, Recipe
from qatkit.recipe.factories import resolve
from qatkit.recipe.loading import flatten

_SAMPLE = 2**20
"""Number of bytes read at each of 65 positions in a large file."""
_MARKERS = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""A folder with one of these files belongs to a model or a tokenizer."""
_LOADED = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""The files read from such a folder: config and weights, the tokenizer and its template."""
_TRAINER_KEYS = ("accelerator", "devices", "strategy", "precision", "compile")

_CONTENT = " (content)"
"""The suffix of keys whose values are file digests."""


def stage_inputs(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the values on which the result of a stage depends, by dotted key, excluding preceding stages.

    If a model or data argument is the path of a file, or of a model or tokenizer folder, its content is included in
    addition to its name; see `_folder_digest`. For a folder of images or recordings, the names and sizes of its files
    are included; for a table with file paths, the names and sizes of these files are included.
    """
    inputs: dict[str, Any] = {"seed": recipe.seed}
    factories: dict[str, FactoryConfig] = {"model": recipe.model, "data": recipe.data}
    for key, config in factories.items():
        inputs |= flatten(config, f"{key}.")
    inputs |= {f"trainer.{key}": getattr(recipe.trainer, key) for key in _TRAINER_KEYS}
    # samples are for reading and change nothing
    inputs |= flatten(dataclasses.replace(recipe.stages[stage], samples=None), f"stages.{stage}.")
    if (own := recipe.stages[stage].model) is not None:
        factories[f"stages.{stage}.model"] = own
    for key, config in factories.items():
        for name, path in _files(config.args, f"{key}.args"):
            inputs[f"{name}{_CONTENT}"] = _digest(path)
    return inputs | _named_files(recipe.data)


def fingerprint(inputs: dict[str, Any], parent: str | None, teacher: str | None = None) -> str:
    """Return a hash of a stage's inputs, chained to the fingerprints of its parent and its teacher."""
    return hashlib.sha256(json.dumps([inputs, parent, teacher], sort_keys=True).encode()).hexdigest()


def changed_keys(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ, each with the old and the new value.

    Example:
        >>> changed_keys({"seed": 1}, {"seed": 2})
        ['seed: was 1, is now 2']
    """
    absent = "absent"
    return [
        f"{key}: was {recorded.get(key, absent)}, is now {current.get(key, absent)}"
        for key in dict.fromkeys([*recorded, *current])
        # as JSON: 1, 1.0 and true are equal in Python but not in a recipe
        if json.dumps(recorded.get(key, absent)) != json.dumps(current.get(key, absent))
    ]


def refuse_changes(stage: str, state: str, recorded: dict[str, Any], current: dict[str, Any], out: Path) -> None:
    """Raise an error if the inputs of a stage have changed since it was started.

    Raises:
        QatkitError: an input has changed; the error lists each changed key with its old and new value.
    """
    # through JSON, as in the record: tuples become lists
    changes = changed_keys(recorded, json.loads(json.dumps(current)))
    if changes:
        listed = "\n  ".join(changes[:10])
        raise QatkitError(
            f"stage '{stage}' in {out} was {state} with different values:\n  {listed}",
            advice="use --force to rerun this stage and all later stages, or use another --out",
        )


def refuse_other_recipe(stage: str, recorded: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Raise an error if a finished stage in a run's folder was trained with a different recipe.

    The content of files in the recipe is not compared, because they may no longer exist.

    Raises:
        QatkitError: a value differs; the error lists each changed key with its old and new value.
    """
    current = json.loads(json.dumps(stage_inputs(recipe, stage)))
    plain = [{key: value for key, value in each.items() if not key.endswith(_CONTENT)} for each in (recorded, current)]
    if changes := changed_keys(*plain):
        raise QatkitError(
            f"the file was changed after stage '{stage}' was finished:\n  " + "\n  ".join(changes[:10]),
            key=str(path),
            advice="rerun the same `qatkit run` command to restore the file",
        )


def _files(value: Any, name: str) -> Iterator[tuple[str, Path]]:
    """Existing files and model folders named anywhere in the arguments; a bare word is not treated as a path."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not (key in ("val", "test") and _is_on_hub(value)):
                yield from _files(part, f"{name}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _files(part, f"{name}[{index}]")
    elif isinstance(value, str) and any(sign in value for sign in "*?["):
        for match in sorted(glob.glob(value, recursive=True)):
            if Path(match).is_file():
                yield f"{name} {match}", Path(match)
    elif isinstance(value, str) and value and (_is_model_folder(value) or _is_data_folder(name, value)):
        yield name, Path(value).expanduser()
    elif isinstance(value, str) and (Path(value).suffix or len(Path(value).parts) > 1):
        with suppress(OSError):  # too long for a name, or not readable
            if Path(value).is_file():
                yield name, Path(value)


def _is_model_folder(value: str) -> bool:
    with suppress(OSError, RuntimeError):  # too long for a name, or of an unknown user
        return any((Path(value).expanduser() / marker).is_file() for marker in _MARKERS)
    return False


def _is_on_hub(source: dict[str, Any]) -> bool:
    """Whether arguments are those of a `qatkit.data.Source` on the hub, whose `val` and `test` name splits."""
    with suppress(OSError, RuntimeError):  # as below
        return isinstance(path := source.get("path"), str) and not is_local(path)
    return False


def _is_data_folder(name: str, value: str) -> bool:
    """Whether an argument of a `qatkit.data.Source` names a folder; elsewhere a word may be one by chance."""
    with suppress(OSError, RuntimeError):  # as above
        return name.rpartition(".")[2] in ("path", "val", "test") and Path(value).expanduser().is_dir()
    return False


def _named_files(data: FactoryConfig) -> dict[str, str]:
    """Digests of the names and sizes of the files that the tables of one of qatkit's data factories name."""
    found: dict[str, str] = {}
    with suppress(QatkitError):  # a factory of the user's own, whose columns are unknown; or the table is refused later
        factory, source = resolve(data.factory, "data.factory"), data.args.get("source")
        defaults = inspect.signature(factory).parameters
        media = [data.args.get(name, defaults[name].default) for name in getattr(factory, "media", ())]
        given = source if isinstance(source, dict) else {}
        tables = {key: given[key] for key in ("path", "val", "test") if isinstance(given.get(key), str)}
        if not media or _is_on_hub(tables):
            return found
        for key, path in tables.items():
            if not Path(path).expanduser().is_dir():
                named = named_files(local_files(path, key), False, media)
                if named:
                    digest = sizes_digest((str(file), file.resolved()) for file in named)
                    found[f"data.args.source.{key}, files named there{_CONTENT}"] = digest
    return found


def _digest(path: Path) -> str:
    if path.is_dir():
        return _folder_digest(path) if _is_model_folder(str(path)) else listing_digest(path)
    return sha256_of(path)


def _folder_digest(folder: Path) -> str:
    """A hash of the files of a folder that a model is loaded from; at most 65 MiB of each are read.

    For a larger file the hash covers its length, the first and the last MiB, and one MiB at each 64th of the file in
    between. The safetensors header with names, dtypes and shapes is at the beginning. Training changes every weight, so
    it changes the hash; an edit of single numbers may not. Times and locations are ignored: a copy is the same model.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _LOADED and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                if size <= 65 * _SAMPLE:
                    digest.update(file.read())
                    continue
                for part in range(65):
                    file.seek((size - _SAMPLE) * part // 64)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
