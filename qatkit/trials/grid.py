"""The configurations of a sweep: combinations of recipe values from the command line."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from qatkit.errors import QatkitError
from qatkit.recipe.strict_yaml import parse_yaml

Configuration = Mapping[str, Any]
"""Values of the swept keys by dotted recipe key."""


def parse_grid(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Split arguments into overrides of all configurations, and swept keys with their values.

    Args:
        arguments: Strings ``key=value,value,...`` with YAML values, which may be lists in brackets.

    Returns:
        The arguments with a single value, and the values of the others by key.

    Raises:
        QatkitError: an argument has no key or no value, a key or a value is repeated, or no key has multiple values.

    Example:
        >>> parse_grid(["seed=1", "stages.qat.quantize.weight.num_bits=2,3", "stages.prune.prune.nm=[2,4],[1,4]"])[1]
        {'stages.qat.quantize.weight.num_bits': [2, 3], 'stages.prune.prune.nm': [[2, 4], [1, 4]]}
    """
    fixed: list[str] = []
    grid: dict[str, list[Any]] = {}
    seen: set[str] = set()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key or not text.strip():
            raise QatkitError(
                "is not key=value,value", key=argument[:100], advice="use the form stages.qat.lr=1e-4,1e-5"
            )
        if key in seen:
            raise QatkitError("the key is set twice", key=key, advice="list all of its values in one argument")
        seen.add(key)
        values = parse_yaml(f"[{text}]", argument[:100], key)
        texts = list(map(value_text, values))
        if repeated := [text for index, text in enumerate(texts) if text in texts[:index]]:
            raise QatkitError(f"{repeated[0]} is listed twice", key=key, advice="remove one of them")
        if len(values) == 1:
            fixed.append(argument)
        else:
            grid[key] = values
    if not grid:
        raise QatkitError(
            "no key has multiple values, so there is nothing to compare",
            key="KEY=VALUES",
            advice="add a key such as stages.qat.quantize.weight.num_bits=2,3,4, or use `qatkit run`",
        )
    return fixed, grid


def configurations(grid: Mapping[str, Sequence[Any]], random_count: int | None, seed: int) -> list[Configuration]:
    """Return all combinations of a grid in order, or a number of distinct random ones.

    Args:
        grid: Values by key.
        random_count: Number of random combinations; None returns all. There are never more than all.
        seed: Seed of the random choice.

    Example:
        >>> configurations({"a": [1, 2], "b": [3, 4]}, None, seed=0)[:3]
        [{'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3}]
        >>> len(configurations({"a": range(100), "b": range(100)}, 5, seed=0))
        5
    """
    if random_count is None:
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    total = math.prod(map(len, grid.values()))
    chosen = random.Random(seed).sample(range(total), min(random_count, total))
    return [_numbered(grid, index) for index in chosen]


def overrides(configuration: Configuration) -> list[str]:
    """Return a configuration as ``key=value`` strings for `load_recipe`."""
    return [f"{key}={value_text(value)}" for key, value in configuration.items()]


def identity(configuration: Configuration) -> frozenset[str]:
    """Return what two configurations have in common if they are the same one.

    Values are compared as YAML: Python considers 1, 1.0 and True equal, and NaN different from itself.

    Example:
        >>> identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1}), identity({"a": 1}) == identity({"a": True})
        (True, False)
    """
    return frozenset(overrides(configuration))


def value_text(value: Any) -> str:
    """Return a value as the YAML that a user would type.

    Example:
        >>> [value_text(value) for value in (0.5, "lsq", "0.5", [2, float("inf")], None)]
        ['0.5', 'lsq', '"0.5"', '[2, .inf]', 'null']
    """
    if isinstance(value, str) and not set(value) & set("[]{},\"'#&*!|>%@`\n") and parse_yaml(value, "") == value:
        return value
    return _flow(value)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest ends of dotted keys that distinguish them.

    Example:
        >>> short_keys(["stages.a.lr", "stages.b.lr", "stages.a.prune.sparsity"])
        {'stages.a.lr': 'a.lr', 'stages.b.lr': 'b.lr', 'stages.a.prune.sparsity': 'sparsity'}
    """
    parts = {key: key.split(".") for key in keys}

    def short(key: str) -> str:
        for length in range(1, len(parts[key])):
            end = parts[key][-length:]
            if sum(other[-length:] == end for other in parts.values()) == 1:
                return ".".join(end)
        return key

    return {key: short(key) for key in keys}


def described(configuration: Configuration) -> str:
    """Return a configuration in one line, with short keys.

    Example:
        >>> described({"stages.qat.quantize.weight.num_bits": 2, "stages.prune.prune.sparsity": 0.5})
        'num_bits=2 sparsity=0.5'
    """
    short = short_keys(list(configuration))
    return " ".join(f"{short[key]}={value_text(value)}" for key, value in configuration.items())


def _numbered(grid: Mapping[str, Sequence[Any]], index: int) -> Configuration:
    chosen: dict[str, Any] = {}
    for key in reversed(list(grid)):
        index, position = divmod(index, len(grid[key]))
        chosen[key] = grid[key][position]
    return {key: chosen[key] for key in grid}


def _flow(value: Any) -> str:
    """A value as one line of YAML, which is JSON except for the numbers that JSON lacks."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value)
