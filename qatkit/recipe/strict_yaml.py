"""Strict YAML: numbers are numbers, duplicates are errors, and only plain data is built.

PyYAML follows YAML 1.1, where ``1e-3`` is a string, ``2:4`` is 124, ``no`` is false, and the second of two equal keys
silently wins. Here, scalars follow YAML 1.2, and ambiguous input raises an error with the line number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML has no types of its own

from qatkit.errors import QatkitError, join_key

_MOST_NODES = 10_000  # aliases of aliases grow exponentially; real recipes stay far below
_DEEPEST = 40  # the libraries that read the values recurse several times per level
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)", tuple("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        tuple("-+.0123456789"),
    ),
    ("merge", r"<<", ("<",)),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the base class is untyped
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute, filled below
    yaml_constructors = {  # noqa: RUF012  # dates, bytes, sets and Python objects have no place in a recipe
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN_TAGS
    }


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # the base class is untyped
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), list(_first))
    # The dumper keeps PyYAML's rules and adds ours: it quotes text that either would read as a number.
    _Dumper.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, source: str, path: str = "") -> Any:
    """Parse a YAML document to plain dicts, lists and scalars without shared objects.

    Args:
        text: The document.
        source: Origin of the document, for errors.
        path: Dotted key whose value is the document, for errors.

    Raises:
        QatkitError: the text is not valid YAML, a key is duplicated or has no value, or an alias contains itself.

    Example:
        >>> parse_yaml("{lr: 1e-3, nm: 2:4}", "the command line")
        {'lr': 0.001, 'nm': '2:4'}
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, path, source, {}, set())
        return _unshared(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise QatkitError(f"not valid YAML: {error.problem or error.context}", key=f"{source}{line}") from None
    except RecursionError:
        raise QatkitError("the blocks are nested too deeply", key=source) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # also a tag that does not fit its value: !!int "a"
        if isinstance(error, QatkitError):
            raise
        raise QatkitError(f"not valid YAML: {' '.join(str(error).split())[:200]}", key=source) from None


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads back as an equal value."""
    # ASCII only: unescaped, PyYAML writes a line separator such as U+0085 that it then reads back as a space
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110))


def _check(node: Any, path: str, source: str, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Count the nodes under `node` with aliases expanded, and refuse ambiguous input that YAML allows."""
    if id(node) in open_nodes:
        raise QatkitError(
            "the alias refers to a block that contains it",
            key=path,
            advice="remove the alias",
            origin=_line(node, source),
        )
    if id(node) in sizes:
        return sizes[id(node)]
    open_nodes.add(id(node))
    if len(open_nodes) > _DEEPEST:
        raise QatkitError(
            f"blocks are nested more than {_DEEPEST} levels deep", key=path or source, advice="reduce the nesting",
            origin=_line(node, source),
        )  # fmt: skip
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _check_text(node, path, source)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, Any] = {}
        for key, value in node.value:
            origin = _line(key, source)
            if not isinstance(key, yaml.ScalarNode):
                raise QatkitError("a key is not text", key=path or "recipe", advice="use name: value", origin=origin)
            _check_text(key, path, source)
            here = join_key(path, key.value)
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                raise QatkitError(
                    f"duplicates the key on line {line}", key=here, advice="remove one of the two keys", origin=origin
                )
            first[key.value] = key
            if value.tag == f"{_TAG}null" and not value.value:
                raise QatkitError(
                    "has no value", key=here, advice="use {} for the defaults, or null for none", origin=origin
                )
            size += _check(value, here, source, sizes, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            size += _check(value, f"{path}[{index}]", source, sizes, open_nodes)
    if size > _MOST_NODES:
        raise QatkitError(
            f"has more than {_MOST_NODES} values",
            key=path or source,
            advice="split the file or remove values",
            origin=_line(node, source),
        )
    open_nodes.discard(id(node))
    sizes[id(node)] = size
    return size


def _check_text(node: Any, path: str, source: str) -> None:
    """Refuse text that is valid in YAML, but in no path, file or terminal."""
    if (found := _NO_TEXT.search(node.value)) is not None:
        raise QatkitError(
            f"the character U+{ord(found[0]):04X} is not text", key=path or "recipe", advice="remove the character",
            origin=_line(node, source),
        )  # fmt: skip


def _line(node: Any, source: str) -> str:
    return f"{source}, line {node.start_mark.line + 1}"


def _unshared(value: Any) -> Any:
    """Copy a value so that aliases become separate objects, and an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value
