"""Strictly check plain data against type annotations, and build dataclasses from it.

Values are converted only from integer to float. OmegaConf would accept ``True`` as a string, ``"5"`` as 5 and 0.5 as 0
steps, and would lose the key of an object whose own check fails. Objects are therefore built here, from the leaves
upwards.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qatkit.common.ranges import FLOAT32, INT64
from qatkit.errors import QatkitError, did_you_mean, join_key, under
from qatkit.recipe.common import MISSING

OLD_KEYS = {"LotteryConfig": {"share": "fraction"}}
"""Renamed keys by class, each with its replacement."""

BLOCKS = "blocks"
"""Key in the metadata of a field that holds one block or a list of blocks: the class of the blocks. OmegaConf has no
such type, so the field itself is annotated as `Any`."""

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}


def read(annotation: Any, value: Any, path: str, resolved: bool = True) -> Any:
    """Check `value` against a type, and build the dataclasses in it.

    Args:
        annotation: A dataclass, `Literal`, union, list, dict, scalar type or `Any`; other annotations are not checked.
        value: Plain data.
        path: Dotted key of the value, for errors; empty at the top level.
        resolved: Pass False while the value may contain interpolations. They are then skipped, and no dataclass is
            built.

    Returns:
        The value, with dataclasses built; None for a dataclass that is not yet built.

    Raises:
        QatkitError: a key is unknown or missing, or a value has the wrong type or is out of range.

    Example:
        >>> from qatkit.spec import QuantSpec
        >>> read(QuantSpec, {"num_bits": 4}, "weight").qmax
        7
    """
    if isinstance(value, str):
        if not resolved and "${" in value:
            return value
        if value == MISSING:
            raise QatkitError("is missing", key=path, advice="set the key")
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return _read_plain(value, path, resolved)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return _read_object(annotation, value, path, resolved)
    if origin is Literal:
        return _read_choice(options, value, path)
    if origin in (Union, types.UnionType):
        return _read_union(options, value, path, resolved)
    if origin in (list, Sequence, Iterable, tuple):
        return _read_list(origin, options, value, path, resolved)
    if origin in (dict, Mapping):
        _require_keys(value, path)
        return {key: read(options[1], item, join_key(path, key), resolved) for key, item in value.items()}
    if annotation in _KINDS:
        return _read_scalar(annotation, value, path)
    return value


def show(value: Any) -> str:
    """Format a value for errors, in shortened YAML syntax."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_object(cls: type[Any], value: Any, path: str, resolved: bool) -> Any:
    _require_keys(value, path)
    hints = get_type_hints(cls)
    for key in value:
        if key not in hints:
            new = OLD_KEYS.get(cls.__name__, {}).get(key)
            problem = "unknown key" if new is None else "this key was renamed"
            advice = did_you_mean(key, hints) if new is None else f"use '{new}'"
            raise QatkitError(problem, key=join_key(path, key), advice=advice)
    arguments = {}
    for field in fields(cls):
        here = join_key(path, field.name)
        if field.name in value:
            block = value[field.name]
            hint = field.metadata.get(BLOCKS, hints[field.name])
            if BLOCKS in field.metadata and isinstance(block, list):
                hint = list[hint]  # type: ignore[valid-type]  # a type that is known only at run time
            if block is not None or BLOCKS not in field.metadata:
                arguments[field.name] = read(hint, block, here, resolved)
        elif field.default == MISSING or (field.default is NO_DEFAULT and field.default_factory is NO_DEFAULT):
            raise QatkitError("is missing", key=here, advice="set the key")
    if not resolved:
        return None
    with under(path):
        try:
            return cls(**arguments)
        except QatkitError:
            raise
        except ValueError as error:  # from a dataclass of the user's code
            raise QatkitError(str(error)) from error


def _read_union(options: tuple[Any, ...], value: Any, path: str, resolved: bool) -> Any:
    if value is None and types.NoneType in options:
        return None
    wanted = [option for option in options if option is not types.NoneType]
    if len(wanted) == 1:
        return read(wanted[0], value, path, resolved)
    if type(value) in wanted:  # so that a number out of range is named as such
        return read(type(value), value, path, resolved)
    for option in wanted:
        try:
            return read(option, value, path, resolved)
        except QatkitError:
            continue
    kinds = " or ".join(_KINDS.get(option, getattr(option, "__name__", str(option))) for option in wanted)
    raise QatkitError(f"{show(value)} is not {kinds}", key=path, advice=f"use {kinds}")


def _read_list(origin: Any, options: tuple[Any, ...], value: Any, path: str, resolved: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        items = str(value) if _is_scalar(value) else "..."
        if re.fullmatch(r"\d+:\d+", items):  # 2:4, the usual notation of N:M sparsity outside YAML
            items = items.replace(":", ", ")
        raise QatkitError(f"{show(value)} is not a list", key=path, advice=f"use [{items}]")
    if origin is tuple and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise QatkitError(f"{show(value)} has {len(value)} values", key=path, advice=f"use {len(options)} values")
        kinds = list(options)
    else:
        kinds = [options[0]] * len(value)
    return [
        read(kind, item, f"{path}[{index}]", resolved)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]


def _read_plain(value: Any, path: str, resolved: bool) -> Any:
    """Check a value that may be anything YAML can express."""
    if isinstance(value, dict):
        return read(dict[str, Any], value, path, resolved)
    if isinstance(value, list):
        return read(list[Any], value, path, resolved)
    return _read_scalar(type(value), value, path) if type(value) in (int, float) else value


def _read_scalar(kind: type[Any], value: Any, path: str) -> Any:
    if kind is float and type(value) in (int, float):
        if not _is_finite(value):
            raise QatkitError(f"{show(value)} is not a finite number", key=path, advice="use a number such as 0.1")
        if abs(value) > FLOAT32:
            raise QatkitError(
                f"{show(value)} does not fit in a float32", key=path, advice=f"use a number up to {FLOAT32:.3g}"
            )
        return float(value)
    if type(value) is not kind:
        raise QatkitError(f"{show(value)} is not {_KINDS[kind]}", key=path, advice=_replacement(kind, value))
    if kind is int and not -INT64 <= value <= INT64:
        raise QatkitError(f"{show(value)} does not fit in 64 bits", key=path, advice=f"use an integer up to {INT64}")
    return value


def _replacement(kind: type[Any], value: Any) -> str:
    """Advice on how to replace a value of the wrong type."""
    if kind is str and _is_scalar(value) and value is not None:
        return f'use "{value}" in quotes'
    if kind in (int, float) and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if kind is int and number.is_integer():
            return f"use {int(number)}"
        if kind is float and math.isfinite(number):
            return f"use {number} without quotes"
    return {int: "use an integer such as 8", float: "use a number such as 0.1"}.get(kind, f"use {_KINDS[kind]}")


def _read_choice(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(type(value) is type(option) and value == option for option in options):
        return value
    advice = did_you_mean(str(value), [str(option) for option in options])
    raise QatkitError(f"unknown value {show(value)}", key=path, advice=advice)


def _require_keys(value: Any, path: str) -> None:
    name = path.rpartition(".")[2] or "recipe"
    if not isinstance(value, dict):
        raise QatkitError(
            f"{show(value)} is not a block of keys", key=path or "recipe", advice=f"use {name}: {{key: value}}"
        )
    for key in value:
        if not isinstance(key, str):
            raise QatkitError(
                f"the key {show(key)} is not text", key=join_key(path, str(key)), advice=f'put it in quotes: "{key}"'
            )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than every float
        return False
