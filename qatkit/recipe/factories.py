"""Code that a recipe names as ``module:callable``: found, judged, checked against its signature, and only then called.

A recipe from a stranger must run nothing. So a module is judged by its name before it is imported, and what comes out
of it is judged again by where it was defined: a module's imports are not its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig
from qatkit.recipe.schema import join, read, show, suggest

# The only parts of qatkit that a recipe may call: the rest (this file too) could be used to reach other code.
HOMES = ("qatkit.models", "qatkit.data")

_NAME = re.compile(r"\w+(?:\.\w+)*:[A-Za-z]\w*(?:\.[A-Za-z]\w*)*", re.ASCII)


def resolve(name: str, key: str, allow: Sequence[str] = ()) -> Callable[..., Any]:
    """The function or class that ``module:callable`` stands for.

    Args:
        name: Such as ``qatkit.models:cnn``.
        key: Dotted key of the name in the recipe, for errors.
        allow: Packages (``my_package``, ``my_package.models``) besides qatkit's factories that may be named.

    Raises:
        QatkitError: the module may not be named or cannot be imported, or the name is no function or class of its own.

    Example:
        >>> resolve("qatkit.models:mlp", "model.factory").__name__
        'mlp'
    """
    if not _NAME.fullmatch(name):
        raise QatkitError(f"{key}: {show(name)} is not module:callable; write it as qatkit.models:cnn")
    module, _, attributes = name.partition(":")
    _judge(module, name, key, allow)
    found: Any = _import(module, name, key)
    for attribute in attributes.split("."):
        if not isinstance(found, ModuleType):
            raise QatkitError(f"{key}: '{name}' is part of another object; write a function or class of a module")
        _judge(found.__name__, name, key, allow)
        found = _attribute(found, attribute, name, key)
    if not isinstance(found, FunctionType | type):
        kind = type(found).__name__
        raise QatkitError(
            f"{key}: '{name}' is no function or class but of type {kind}; name a function that returns it"
        )
    owner = found.__module__
    if not isinstance(owner, str):
        raise QatkitError(f"{key}: '{name}' does not say which module defines it; name a function of a module")
    _judge(owner, name, key, allow)
    return found


def check_arguments(
    fn: Callable[..., Any], args: Mapping[str, Any], key: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """Check keyword arguments against a function's signature and its annotations, without calling it.

    Args:
        fn: A function or class.
        args: What the recipe gives.
        key: Dotted key of `args` in the recipe, for errors.
        given: Names of the arguments that qatkit passes besides.

    Returns:
        `args`, with whole numbers made floats and dataclasses built where the annotations ask for them.

    Raises:
        QatkitError: an argument is unknown, missing or plainly of the wrong type.

    Example:
        >>> check_arguments(lambda width, depth=2: ..., {"width": 8}, "model.args")
        {'width': 8}
    """
    try:
        parameters = _signature(fn).parameters.values()
    except ValueError:  # a class written in C: the call itself will tell
        return dict(args)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name: parameter for parameter in parameters if parameter.kind in kinds}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    own = [name for name in known if name not in given]
    title = getattr(fn, "__qualname__", str(fn))
    for name in given:
        if name in args:
            raise QatkitError(f"{key}.{name}: {show(args[name])} would be overwritten by qatkit; leave it out")
        if name not in known and not takes_any:
            raise QatkitError(
                f"{key}: {title} takes no argument '{name}', which qatkit passes to it; add it to {title}"
            )
    for name in args:
        if name not in known and not takes_any:
            raise QatkitError(f"{join(key, name)}: {title} takes no such argument; {suggest(name, own)}")
    for parameter in parameters:
        required = parameter.default is parameter.empty
        if required and "VAR_" not in parameter.kind.name and parameter.name not in [*args, *given]:
            raise QatkitError(f"{join(key, parameter.name)}: is missing; {title} needs it")
    return {
        name: read(known[name].annotation, value, join(key, name)) if name in known else value
        for name, value in args.items()
    }


def build(config: FactoryConfig, key: str, allow: Sequence[str] = (), **extra: Any) -> Any:
    """Resolve, check and call a factory.

    Args:
        config: The factory and its arguments.
        key: Dotted key of the config in the recipe, for errors.
        allow: Packages besides qatkit's factories that may be named.
        extra: Arguments that qatkit passes besides those of the recipe.

    Raises:
        QatkitError: the factory or its arguments do not fit, or the factory refuses a value with a ValueError.

    Example:
        >>> build(FactoryConfig("qatkit.models:mlp", {"hidden": [8]}), "model")[1].out_features
        8
    """
    fn = resolve(config.factory, f"{key}.factory", allow)
    args = check_arguments(fn, config.args, f"{key}.args", tuple(extra))
    try:
        return fn(**args, **extra)
    except ValueError as error:
        named = str(error).partition(":")[0] in args  # the factory's message starts with the argument
        raise QatkitError(f"{key}.args{'.' if named else ': '}{error}") from error


def _judge(module: str, name: str, key: str, allow: Sequence[str]) -> None:
    """Refuse a module that a recipe may not use code from."""
    if any(module == prefix or module.startswith(f"{prefix}.") for prefix in (*HOMES, *allow)):
        return
    source = f"'{name}' is" if name.startswith(f"{module}:") else f"'{name}' is from '{module}',"
    package = module.partition(".")[0]
    if package == "qatkit":
        raise QatkitError(f"{key}: {source} no factory of qatkit; those are in {' and '.join(HOMES)}")
    raise QatkitError(
        f"{key}: {source} outside qatkit, and a recipe runs no other code; if you trust it: --allow {package}"
    )


def _import(module: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            here = Path(f"{error.name}.py").exists() or Path(error.name).is_dir()
            near = suggest(module, _siblings(error.name))
            if here:  # a console script does not look in the current folder, as `python script.py` does
                near = "it is in this folder, which Python does not search; write PYTHONPATH=. before the command"
            raise QatkitError(f"{key}: '{name}': there is no module '{error.name}'; {near}") from None
        raise QatkitError(f"{key}: '{name}' needs '{error.name}', which is not installed; install it") from error
    except Exception as error:  # foreign code may raise anything while it is imported
        said = f"{type(error).__name__}: {error}"
        raise QatkitError(f"{key}: '{name}': its module fails to import ({said}); mend it") from error


def _siblings(missing: str) -> list[str]:
    """Modules that stand where a missing one was looked for."""
    package = missing.rpartition(".")[0]
    if not package:
        return [found.name for found in pkgutil.iter_modules() if not found.name.startswith("_")]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [f"{package}.{found.name}" for found in pkgutil.iter_modules(folders or [])]


def _attribute(module: ModuleType, attribute: str, name: str, key: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = getattr(module, "__all__", None) or [
            found for found, value in vars(module).items()
            if isinstance(value, FunctionType | type) and value.__module__ == module.__name__
        ]  # fmt: skip
        near = suggest(attribute, names)
        raise QatkitError(f"{key}: '{name}': {module.__name__} has no '{attribute}'; {near}") from None
    except ImportError as error:  # a module that loads its names on use
        raise QatkitError(f"{key}: '{name}' cannot be loaded ({error}); install what it needs") from error


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except Exception:  # annotations that exist for type checkers only stay text, and are not judged
        return inspect.signature(fn)
