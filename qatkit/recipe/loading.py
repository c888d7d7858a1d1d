"""Load a typed, frozen and complete `Recipe` from a name or a file, without heavy imports.

The file and the overrides are combined into one raw mapping. It is checked against the schema, merged once into
OmegaConf's structured config for defaults and interpolations, and checked again when the objects are created.
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

from qatkit.errors import QatkitError, did_you_mean, join_key
from qatkit.recipe.recipe import Recipe, check_schema_version
from qatkit.recipe.schema import read, show
from qatkit.recipe.strict_yaml import dump_yaml, parse_yaml

Scalar = str | int | float | bool | None

_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w-]*(?:\.[\w-]+)*\}", re.ASCII)


def list_recipes() -> list[str]:
    """Return the names of the built-in recipes, such as ``vision/digits_int4``."""
    root = resources.files("qatkit.recipes")
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str | os.PathLike[str]) -> str:
    """Return the text of a recipe, unchanged.

    Args:
        name_or_path: A name from `list_recipes`, or the path of a file.

    Raises:
        QatkitError: the recipe does not exist, or the file cannot be read.
    """
    name = os.fspath(name_or_path)
    shipped = list_recipes()
    key, advice = f"recipe '{name}'", "pass the path of a .yaml file"
    try:
        if name in shipped:
            return (resources.files("qatkit.recipes") / f"{name}.yaml").read_text("utf-8")
        return Path(name).read_text("utf-8-sig")
    except FileNotFoundError:
        nearest = did_you_mean(name.removesuffix(".yaml"), shipped)
        raise QatkitError("no file and no built-in recipe has this name", key=key, advice=nearest) from None
    except IsADirectoryError:
        raise QatkitError("is a folder", key=key, advice=advice) from None
    except UnicodeDecodeError:
        raise QatkitError("is not UTF-8 text", key=key, advice=advice) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "check the path and its permissions"
        raise QatkitError(f"cannot be read ({reason})", key=key, advice=advice) from None


def recipe_description(name: str) -> str:
    """Return the first sentence in a built-in recipe's header.

    Example:
        >>> recipe_description("vision/digits_int8")
        'Train a small CNN with int8 weights and activations and the dense model as the teacher.'
    """
    return recipe_text(name).splitlines()[0].lstrip("# ")


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it against the schema, without importing torch or the recipe's code.

    Args:
        name_or_path: A name from `list_recipes`, or the path of a YAML file.
        overrides: Strings ``key=value`` with a dotted key and a YAML value, which replace values of the file.

    Returns:
        The recipe, with all defaults filled in and every ``${key}`` replaced by its value.

    Raises:
        QatkitError: the first mistake, with its key, the value seen and the fix.

    Example:
        >>> load_recipe("vision/digits_int4", ["stages.qat.lr=1e-5"]).stages["qat"].lr
        1e-05
    """
    source = os.fspath(name_or_path)
    raw = parse_yaml(recipe_text(name_or_path), source)
    if raw is None:
        raise QatkitError("is empty", key=source, advice="add name, model, data and stages")
    if not isinstance(raw, dict):
        raise QatkitError(
            f"{show(raw)} is not a recipe", key=source, advice="use a block of keys: name, model, data and stages"
        )
    for override in overrides:
        _apply(raw, override)
    try:
        if "schema_version" in raw:  # before its keys, which another version may name differently
            check_schema_version(raw["schema_version"])
        read(Recipe, raw, "", resolved=False)
        recipe = read(Recipe, _resolve(raw), "")
    except QatkitError as error:
        raise error.with_fields(origin=_origin(error.key, source, overrides)) from None
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the complete recipe with its defaults, as YAML that loads as an equal recipe."""
    return dump_yaml(dataclasses.asdict(recipe))


def flatten(data: object, prefix: str = "") -> dict[str, Scalar]:
    """Flatten nested data to plain values by dotted key, to compare two recipes key by key.

    Args:
        data: A dataclass instance or a mapping. A list or an empty mapping becomes one value, its JSON text.
        prefix: Prepended to every key unchanged; include the dot.

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
        raise QatkitError("is not key=value", key=_quote(override), advice="use the form stages.qat.lr=1e-5")
    value = parse_yaml(text, _quote(override), key.strip())
    block = raw
    for depth, name in enumerate(names[:-1]):
        here = ".".join(names[: depth + 1])
        if block.get(name) is None:
            if names[:depth] == ["stages"]:  # a typo must not be accepted as the first key of a new stage
                raise QatkitError("no such stage", key=here, advice=did_you_mean(name, block), origin=_quote(override))
            block[name] = {}
        if not isinstance(block[name], dict):
            raise QatkitError(
                f"{show(block[name])} has no keys to override",
                key=here,
                advice=f"replace the whole value: {here}=...",
                origin=_quote(override),
            )
        block = block[name]
    block[names[-1]] = value


def _resolve(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults and replace every ``${key}``; nothing is evaluated."""
    for path, text in _interpolations(raw, ""):
        if "${" in _REFERENCE.sub("", text) or "\\${" in text:
            raise QatkitError(
                f"{show(text)} is not a plain reference to a key, and recipes cannot run code",
                key=path,
                advice="use the value itself, or ${key}",
            )
    # The typed config gives the defaults. Its values are resolved untyped: typed, OmegaConf would convert them.
    complete = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Recipe), raw))
    references = dict(_interpolations(complete, ""))
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(complete), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        path = getattr(error, "full_key", None) or next(iter(references))
        text = references.get(path, "${...}")
        problem, advice = "refers to itself", "use the value itself"
        if isinstance(error, InterpolationKeyError):
            problem = "refers to an unknown key"
            advice = did_you_mean(text.strip("${}").lstrip("."), _keys(complete, ""))
        elif isinstance(error, InterpolationToMissingValueError):
            problem, advice = "refers to a missing value", "set the value"
        raise QatkitError(f"{show(text)} {problem}", key=path, advice=advice) from None
    for path, text in _interpolations(resolved, ""):
        problem = f"resolves to {show(text)}, which is another reference"
        raise QatkitError(problem, key=path, advice="use the value itself")
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _interpolations(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and "${" in value:
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _interpolations(item, join_key(path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _interpolations(item, f"{path}[{index}]")


def _keys(value: Any, path: str) -> Iterator[str]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _keys(item, join_key(path, str(key)))


def _origin(key: str, source: str, overrides: Sequence[str]) -> str:
    """Where a value was set: in the last override of its key, else in the file."""
    block = key.rpartition(".")[0]
    for override in reversed(overrides):
        changed = override.partition("=")[0].strip()
        if key == changed or key.startswith((f"{changed}.", f"{changed}[")) or changed.startswith(f"{key}."):
            return _quote(override)
        if block and changed.rpartition(".")[0] == block:  # two keys of one block may conflict
            return f"{source}, with {_quote(override)}"
    return source


def _quote(override: str) -> str:
    return f"override '{override}'" if len(override) <= 100 else f"override '{override[:97]}...'"
