"""Records: JSON files with a schema version and a content digest, which are fully checked when read.

Every JSON file that qatkit writes and reads back is written by `write_signed` and read by `read_signed`.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError, join_key


def content_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 digest of the content of a record, as canonical JSON without the field ``digest``.

    Example:
        >>> content_digest({"b": 1, "a": 2}) == content_digest({"a": 2, "b": 1, "digest": "any"})
        True
    """
    fields_of = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields_of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_signed(path: Path, content: Mapping[str, Any], schema: int, text: Callable[[Any], str] = json.dumps) -> None:
    """Write a record atomically.

    Args:
        path: The file.
        content: The fields of the record, as plain data.
        schema: The version of its schema.
        text: Formats the record as JSON.
    """
    plain = json.loads(json.dumps({"schema": schema} | dict(content)))  # keys and tuples as they will be read
    write_atomically(path, text(plain | {"digest": content_digest(plain)}))


def read_signed(path: Path, kind: type[Any], schema: int, advice: str) -> dict[str, Any] | None:
    """Read the fields of a record; None if the file does not exist.

    Args:
        path: The file.
        kind: A dataclass or a `TypedDict` whose annotations the fields must match.
        schema: The only supported version of the schema.
        advice: How to create a new record, for errors.

    Raises:
        QatkitError: the file is not a record, was written by a version with a different schema, has changed since it
            was written, or has invalid fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error), advice) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"the file contains a {type(content).__name__}, not an object", advice)
    digest = content.pop("digest", None)
    signed = content_digest(content)
    written = content.pop("schema", None)
    if written != schema or isinstance(written, bool):
        versions = content.get("versions")
        writer = versions.get("qatkit") if isinstance(versions, dict) else None
        raise QatkitError(
            f"{path} has schema {str(written)[:20]}, but this version of qatkit reads schema {schema}",
            advice=f"{advice}, or use "
            f"{f'qatkit {writer}, which' if isinstance(writer, str) else 'the version that'} wrote it",
        )
    if digest != signed:
        raise _damaged(path, "the digest does not match the content", advice)
    if (reason := misfit(kind, content)) is not None:
        raise _damaged(path, reason, advice)
    return content


def misfit(annotation: Any, value: Any, name: str = "") -> str | None:
    """The reason why a JSON value does not match a type; None if it matches.

    Args:
        annotation: A scalar type, `Any`, a list, tuple, dictionary or union of types, a dataclass or a `TypedDict`.
        value: The value.
        name: The dotted name of the value, for the reason.

    Example:
        >>> misfit(dict[str, list[int]], {"a": [1, 2.5]})
        'a[1] is a float'
    """
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return None
    if is_dataclass(annotation) or is_typeddict(annotation):
        return _misfit_of_fields(annotation, value, name)
    if origin in (Union, types.UnionType):
        return min((misfit(option, value, name) for option in options), key=lambda reason: reason is not None)
    plain = origin or annotation
    kinds = {float: (int, float), tuple: (list,)}.get(plain, (plain,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and plain is not bool):
        return f"{name or 'it'} is a {type(value).__name__}"
    items: list[tuple[Any, Any, str]] = []
    if plain is list and options:
        items = [(options[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    elif plain is tuple and options:
        if len(value) != len(options):
            return f"{name} has {len(value)} values instead of {len(options)}"
        items = [(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(options, value, strict=True))]
    elif plain is dict and options:
        items = [(options[1], item, join_key(name, key)) for key, item in value.items()]
    return next((reason for item in items if (reason := misfit(*item)) is not None), None)


def _misfit_of_fields(annotation: Any, value: Any, name: str) -> str | None:
    if not isinstance(value, dict):
        return f"{name or 'it'} is a {type(value).__name__}"
    hints = get_type_hints(annotation)
    if missing := sorted(set(hints) - set(value)):
        return f"{join_key(name, missing[0])} is missing"
    if unknown := sorted(set(value) - set(hints)):
        return f"unknown field {join_key(name, unknown[0])}"
    reasons = (misfit(hint, value[key], join_key(name, key)) for key, hint in hints.items())
    return next((reason for reason in reasons if reason is not None), None)


def _damaged(path: Path, reason: str, advice: str) -> QatkitError:
    return QatkitError(f"{path} is corrupt ({reason[:200]})", advice=f"restore the file, or {advice}")
