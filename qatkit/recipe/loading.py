"""From a name or a file to a `Recipe`: typed, frozen, complete, and before anything heavy is imported.

The file and the overrides become one raw mapping, which is checked against the schema, merged once into OmegaConf's
structured config for its defaults and interpolations, and checked again as the objects are built from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException

from qatkit.errors import QatkitError
from qatkit.recipe import Recipe
from qatkit.recipe.schema import join, read, show, suggest
from qatkit.recipe.strict_yaml import dump_yaml, parse_yaml

Scalar = str | int | float | bool | None

_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w-]*(?:\.[\w-]+)*\}", re.ASCII)


def list_recipes() -> list[str]:
    """Names of the shipped recipes, such as ``vision/digits_int4``."""
    root = resources.files("qatkit.recipes")
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str | os.PathLike[str]) -> str:
    """The text of a recipe as it was written.

    Args:
        name_or_path: A name out of `list_recipes`, else the path of a file.

    Raises:
        QatkitError: there is no such recipe, or the file cannot be read.
    """
    name = os.fspath(name_or_path)
    shipped = list_recipes()
    try:
        if name in shipped:
            return (resources.files("qatkit.recipes") / f"{name}.yaml").read_text("utf-8")
        return Path(name).read_text("utf-8-sig")
    except FileNotFoundError:
        near = suggest(name.removesuffix(".yaml"), shipped)
        raise QatkitError(f"recipe '{name}': no such file or shipped recipe; {near}") from None
    except IsADirectoryError:
        raise QatkitError(f"recipe '{name}': is a folder; write the path of a .yaml file") from None
    except UnicodeDecodeError:
        raise QatkitError(f"recipe '{name}': is not UTF-8 text; write the path of a .yaml file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QatkitError(f"recipe '{name}': cannot be read ({reason}); check the path and its rights") from None


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it against the schema; imports neither torch nor any code that the recipe names.

    Args:
        name_or_path: A name out of `list_recipes`, else the path of a YAML file.
        overrides: ``key=value`` with a dotted key and a YAML value; they replace what the file says.

    Returns:
        The recipe, with every default filled in and every ``${key}`` replaced by its value.

    Raises:
        QatkitError: the first mistake found, by its key, the value seen and what to write instead.

    Example:
        >>> load_recipe("vision/digits_int4", ["stages.qat.lr=1e-5"]).stages["qat"].lr
        1e-05
    """
    source = os.fspath(name_or_path)
    raw = parse_yaml(recipe_text(name_or_path), source)
    if raw is None:
        raise QatkitError(f"{source}: is empty; write name, model, data and stages")
    if not isinstance(raw, dict):
        raise QatkitError(f"{source}: {show(raw)} is no recipe; write a block of keys: name, model, data and stages")
    for override in overrides:
        _apply(raw, override)
    try:
        read(Recipe, raw, "", resolved=False)
        recipe = read(Recipe, _resolve(raw), "")
    except QatkitError as error:
        raise QatkitError(f"{error} ({_origin(str(error), source, overrides)})") from None
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The complete recipe, defaults included, as YAML that loads to an equal one."""
    return dump_yaml(dataclasses.asdict(recipe))


def flatten(data: object, prefix: str = "") -> dict[str, Scalar]:
    """Plain values by dotted key, to compare two recipes key by key.

    Args:
        data: A dataclass instance or a mapping. A list, or an empty mapping, is one value: its JSON text.
        prefix: Stands before every key, with its own dot.

    Example:
        >>> flatten({"args": {"hidden": [8, 8]}, "factory": "qatkit.models:mlp"}, "model.")
        {'model.args.hidden': '[8, 8]', 'model.factory': 'qatkit.models:mlp'}
    """
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    assert isinstance(data, Mapping)
    flat: dict[str, Scalar] = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, str | int | float):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def _apply(raw: dict[str, Any], override: str) -> None:
    """Put one ``key=value`` into the raw recipe."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not text.strip() or not all(names):
        raise QatkitError(f"{_quote(override)}: is not key=value; write it as stages.qat.lr=1e-5")
    value = parse_yaml(text, _quote(override), key.strip())
    block = raw
    for depth, name in enumerate(names[:-1]):
        here = ".".join(names[: depth + 1])
        if block.get(name) is None:
            if names[:depth] == ["stages"]:  # a typo must not pass as the first key of a new stage
                raise QatkitError(f"{here}: no such stage; {suggest(name, block)} ({_quote(override)})")
            block[name] = {}
        if not isinstance(block[name], dict):
            raise QatkitError(
                f"{here}: {show(block[name])} has no keys to override; give all of it: {here}=... ({_quote(override)})"
            )
        block = block[name]
    block[names[-1]] = value


def _resolve(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults and replace every ``${key}``; nothing is evaluated."""
    for path, text in _interpolations(raw, ""):
        if "${" in _REFERENCE.sub("", text) or "\\${" in text:
            raise QatkitError(
                f"{path}: {show(text)} is more than a reference to a key, and a recipe runs nothing; "
                "write the value itself, or ${key}"
            )
    # The typed config gives the defaults. Its values are resolved untyped: typed, OmegaConf would convert them.
    complete = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Recipe), raw))
    seen = dict(_interpolations(complete, ""))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(complete), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        path = getattr(error, "full_key", None) or next(iter(seen))
        text = seen.get(path, "${...}")
        if isinstance(error, InterpolationKeyError):
            name = text.strip("${}").lstrip(".")
            raise QatkitError(f"{path}: {show(text)} names no key; {suggest(name, _keys(complete, ''))}") from None
        if isinstance(error, InterpolationToMissingValueError):
            raise QatkitError(f"{path}: {show(text)} names a value that is missing; give it a value") from None
        raise QatkitError(f"{path}: {show(text)} refers to itself; write the value itself") from None
    for path, text in _interpolations(resolved, ""):
        raise QatkitError(f"{path}: becomes {show(text)}, which is a reference again; write the value itself")
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _interpolations(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and "${" in value:
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _interpolations(item, join(path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _interpolations(item, f"{path}[{index}]")


def _keys(value: Any, path: str) -> Iterator[str]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _keys(item, join(path, str(key)))


def _origin(message: str, source: str, overrides: Sequence[str]) -> str:
    """Where the mistake was written: the last override of the key that the message starts with, else the file."""
    path = message.partition(": ")[0]
    block = path.rpartition(".")[0]
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if path == key or path.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{path}."):
            return _quote(override)
        if block and key.rpartition(".")[0] == block:  # two keys of one block may not fit each other
            return f"{source}, with {_quote(override)}"
    return source


def _quote(override: str) -> str:
    return f"override '{override}'" if len(override) <= 100 else f"override '{override[:97]}...'"
