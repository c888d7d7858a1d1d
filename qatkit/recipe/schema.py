"""Plain data against type annotations, strictly: what a recipe says is what is built, or the error names the key.

Nothing is converted but a whole number to a float. OmegaConf would take ``True`` for text, ``"5"`` for 5 and 0.5 steps
for 0, and would lose the key of an object whose own check fails; so objects are built here, from the leaves upwards.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qatkit.errors import QatkitError
from qatkit.recipe import MISSING

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def read(annotation: Any, value: Any, path: str, resolved: bool = True) -> Any:
    """Check `value` against a type, and build the dataclasses in it.

    Args:
        annotation: A dataclass, `Literal`, union, list, dict, scalar type or `Any`; anything else is not judged.
        value: Plain data.
        path: Dotted key of the value, for errors; empty at the top.
        resolved: False while the value may hold interpolations: they are skipped, and nothing is built.

    Returns:
        The value with dataclasses built; None for a dataclass that is not built yet.

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
            raise QatkitError(f"{path}: is missing; give it a value")
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
        return {key: read(options[1], item, join(path, key), resolved) for key, item in value.items()}
    if annotation in _KINDS:
        return _read_scalar(annotation, value, path)
    return value


def join(path: str, key: str) -> str:
    """The dotted key of `key` inside `path`."""
    return f"{path}.{key}" if path else key


def show(value: Any) -> str:
    """A value as an error shows it: as YAML would spell it, and short."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest one that exists, or a few of them."""
    names = [str(candidate) for candidate in known]
    by_lower = {candidate.lower(): candidate for candidate in reversed(names)}
    if near := difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5):
        return f"did you mean '{by_lower[near[0]]}'?"
    if not names:
        return "none is known here"
    return f"write one of {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def _read_object(cls: type[Any], value: Any, path: str, resolved: bool) -> Any:
    _require_keys(value, path)
    hints = get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise QatkitError(f"{join(path, key)}: unknown key; {suggest(key, hints)}")
    arguments = {}
    for field in fields(cls):
        here = join(path, field.name)
        if field.name in value:
            arguments[field.name] = read(hints[field.name], value[field.name], here, resolved)
        elif field.default == MISSING or (field.default is NO_DEFAULT and field.default_factory is NO_DEFAULT):
            raise QatkitError(f"{here}: is missing; give it a value")
    if not resolved:
        return None
    try:
        return cls(**arguments)
    except QatkitError as error:  # from __post_init__
        raise error.under(path) from None
    except ValueError as error:  # the same, with a message that starts with the field
        raise QatkitError(join(path, str(error))) from None


def _read_union(options: tuple[Any, ...], value: Any, path: str, resolved: bool) -> Any:
    if value is None and types.NoneType in options:
        return None
    wanted = [option for option in options if option is not types.NoneType]
    if len(wanted) == 1:
        return read(wanted[0], value, path, resolved)
    for option in wanted:
        try:
            return read(option, value, path, resolved)
        except QatkitError:
            continue
    kinds = " or ".join(_KINDS.get(option, getattr(option, "__name__", str(option))) for option in wanted)
    raise QatkitError(f"{path}: {show(value)} is not {kinds}; write one of these")


def _read_list(origin: Any, options: tuple[Any, ...], value: Any, path: str, resolved: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        items = str(value) if _is_scalar(value) else "..."
        if re.fullmatch(r"\d+:\d+", items):  # 2:4, as N:M sparsity is written everywhere but in YAML
            items = items.replace(":", ", ")
        raise QatkitError(f"{path}: {show(value)} is not a list; write [{items}]")
    if origin is tuple and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise QatkitError(f"{path}: {show(value)} has {len(value)} values; write {len(options)}")
        kinds = list(options)
    else:
        kinds = [options[0]] * len(value)
    return [
        read(kind, item, f"{path}[{index}]", resolved)
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]


def _read_plain(value: Any, path: str, resolved: bool) -> Any:
    """A value that may be anything that YAML can say."""
    if isinstance(value, dict):
        return read(dict[str, Any], value, path, resolved)
    if isinstance(value, list):
        return read(list[Any], value, path, resolved)
    return _read_scalar(float, value, path) if isinstance(value, float) else value


def _read_scalar(kind: type[Any], value: Any, path: str) -> Any:
    if kind is float and type(value) in (int, float):
        if not _is_finite(value):
            raise QatkitError(f"{path}: {show(value)} is not a finite number; write a number such as 0.1")
        return float(value)
    if type(value) is not kind:
        raise QatkitError(f"{path}: {show(value)} is not {_KINDS[kind]}; {_fix(kind, value)}")
    return value


def _fix(kind: type[Any], value: Any) -> str:
    """What to write instead of a value that has the wrong type."""
    if kind is str and _is_scalar(value) and value is not None:
        return f'write "{value}" in quotes'
    if kind in (int, float) and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if kind is int and number.is_integer():
            return f"write {int(number)}"
        if kind is float and math.isfinite(number):
            return f"write {number} without quotes"
    return {int: "write a number such as 8", float: "write a number such as 0.1"}.get(kind, f"write {_KINDS[kind]}")


def _read_choice(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(type(value) is type(option) and value == option for option in options):
        return value
    choices = [str(option) for option in options]
    near = suggest(value, choices) if isinstance(value, str) else ""
    near = near if near.startswith("did") else "write one of these"
    raise QatkitError(f"{path}: {show(value)} is not one of {', '.join(choices)}; {near}")


def _require_keys(value: Any, path: str) -> None:
    name = path.rpartition(".")[2] or "recipe"
    if not isinstance(value, dict):
        raise QatkitError(f"{path or 'recipe'}: {show(value)} is not a block of keys; write {name}: {{key: value}}")
    for key in value:
        if not isinstance(key, str):
            raise QatkitError(f'{join(path, str(key))}: the key {show(key)} is not text; write "{key}" in quotes')


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False
