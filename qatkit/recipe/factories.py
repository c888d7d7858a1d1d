"""Resolve, check and call the code that a recipe refers to as ``module:callable``.

An untrusted recipe must not run arbitrary code. A module is checked by name before it is imported. The imported object
is then checked by its defining module, because a module also exposes its own imports.
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

from qatkit.errors import QatkitError, did_you_mean, join_key
from qatkit.recipe.common import FactoryConfig
from qatkit.recipe.schema import read, show

# The only parts of qatkit that a recipe may call: others, such as this file, could be used to reach arbitrary code.
HOMES = ("qatkit.models", "qatkit.data")

_NAME = re.compile(r"\w+(?:\.\w+)*:[A-Za-z]\w*(?:\.[A-Za-z]\w*)*", re.ASCII)


def resolve(name: str, key: str, allow: Sequence[str] = ()) -> Callable[..., Any]:
    """Import the function or class that ``module:callable`` refers to.

    Args:
        name: The reference, such as ``qatkit.models:cnn``.
        key: Dotted key of the name in the recipe, for errors.
        allow: Packages (``my_package``, ``my_package.models``) that are allowed in addition to qatkit's factories.

    Raises:
        QatkitError: the module is not allowed or cannot be imported, or the name does not refer to a function or class
            defined in the module.

    Example:
        >>> resolve("qatkit.models:mlp", "model.factory").__name__
        'mlp'
    """
    if not _NAME.fullmatch(name):
        raise QatkitError(f"{show(name)} is not module:callable", key=key, advice="use the form qatkit.models:cnn")
    module, _, attributes = name.partition(":")
    _check_allowed(module, name, key, allow)
    target: Any = _import(module, name, key)
    for attribute in attributes.split("."):
        if not isinstance(target, ModuleType):
            raise QatkitError(
                f"'{name}' is an attribute of another object",
                key=key,
                advice="use a function or class that a module defines",
            )
        _check_allowed(target.__name__, name, key, allow)
        target = _attribute(target, attribute, name, key)
    if not isinstance(target, FunctionType | type):
        raise QatkitError(
            f"'{name}' is neither a function nor a class, but of type {type(target).__name__}",
            key=key,
            advice="use a function that returns the object",
        )
    owner = target.__module__
    if not isinstance(owner, str):
        raise QatkitError(
            f"the module that defines '{name}' is unknown", key=key, advice="use a function that a module defines"
        )
    _check_allowed(owner, name, key, allow)
    return target


def check_arguments(
    fn: Callable[..., Any], args: Mapping[str, Any], key: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """Check keyword arguments against a function's signature and annotations, without calling it.

    Args:
        fn: A function or class.
        args: Arguments in the recipe.
        key: Dotted key of `args` in the recipe, for errors.
        given: Names of the arguments that qatkit passes itself.

    Returns:
        The arguments, with dataclasses built if the annotations require them.

    Raises:
        QatkitError: an argument is unknown, is missing, has the wrong type, or is passed by qatkit.

    Example:
        >>> def net(width: int, depth: int = 2): ...
        >>> check_arguments(net, {"width": 3}, "model.args")
        {'width': 3}
    """
    try:
        parameters = _signature(fn).parameters.values()
    except ValueError:  # a class written in C: the call itself will check
        return dict(args)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name: parameter for parameter in parameters if parameter.kind in kinds}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    title = getattr(fn, "__qualname__", str(fn))
    for name in given:
        if name in args:
            raise QatkitError(
                f"{show(args[name])} would be overwritten, because qatkit sets this argument",
                key=join_key(key, name),
                advice="remove the argument",
            )
        if name not in known and not takes_any:
            raise QatkitError(
                f"{title} has no argument '{name}', which qatkit passes", key=key, advice=f"add the argument to {title}"
            )
    for name in args:
        if name not in known and not takes_any:
            advice = did_you_mean(name, [own for own in known if own not in given])
            raise QatkitError(f"{title} has no such argument", key=join_key(key, name), advice=advice)
    for parameter in parameters:
        required = parameter.default is parameter.empty
        if required and "VAR_" not in parameter.kind.name and parameter.name not in [*args, *given]:
            raise QatkitError(
                f"is missing, and {title} requires it", key=join_key(key, parameter.name), advice="set the argument"
            )
    return {
        name: read(known[name].annotation, value, join_key(key, name)) if name in known else value
        for name, value in args.items()
    }


def build(config: FactoryConfig, key: str, allow: Sequence[str] = (), **extra: Any) -> Any:
    """Resolve, check and call a factory.

    Args:
        config: The factory and its arguments.
        key: Dotted key of the config in the recipe, for errors.
        allow: Packages that are allowed in addition to qatkit's factories.
        extra: Arguments that qatkit passes in addition to those in the recipe.

    Raises:
        QatkitError: the factory or its arguments are invalid, or the factory raises a ValueError.

    Example:
        >>> build(FactoryConfig("qatkit.models:mlp", {"hidden": [8]}), "model")[1].out_features
        8
    """
    fn = resolve(config.factory, f"{key}.factory", allow)
    args = check_arguments(fn, config.args, f"{key}.args", tuple(extra))
    try:
        return fn(**args, **extra)
    except QatkitError as error:
        if error.key and re.split(r"[.\[]", error.key)[0] not in _signature(fn).parameters:  # a file, for example
            raise
        raise error.under(f"{key}.args") from error.__cause__
    except ValueError as error:
        raise QatkitError(str(error), key=f"{key}.args") from error


def _check_allowed(module: str, name: str, key: str, allow: Sequence[str]) -> None:
    """Reject a module whose code a recipe may not use."""
    if any(module == prefix or module.startswith(f"{prefix}.") for prefix in (*HOMES, *allow)):
        return
    subject = f"'{name}' is" if name.startswith(f"{module}:") else f"'{name}' is from '{module}',"
    package = module.partition(".")[0]
    if package == "qatkit":
        raise QatkitError(f"{subject} not a qatkit factory", key=key, advice=f"use a factory in {' or '.join(HOMES)}")
    raise QatkitError(
        f"{subject} outside qatkit, but a recipe may run only qatkit's factories",
        key=key,
        advice=f"pass --allow {package} if you trust its code",
    )


def _import(module: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            advice = did_you_mean(module, _siblings(error.name))
            problem = f"'{name}': there is no module '{error.name}'"
            # a console script does not search the current folder, as `python script.py` does
            if Path(f"{error.name}.py").exists() or Path(error.name).is_dir():
                problem += " on Python's path, although one is in this folder"
                advice = "put PYTHONPATH=. before the command"
            raise QatkitError(problem, key=key, advice=advice) from None
        raise QatkitError(
            f"'{name}' needs '{error.name}', which is not installed", key=key, advice=f"install {error.name}"
        ) from error
    except Exception as error:  # foreign code may raise anything while it is imported
        raise QatkitError(
            f"the module of '{name}' cannot be imported ({type(error).__name__}: {error})",
            key=key,
            advice="fix the module",
        ) from error


def _siblings(missing: str) -> list[str]:
    """Modules in the folder where a missing one was expected."""
    package = missing.rpartition(".")[0]
    if not package:
        return [module.name for module in pkgutil.iter_modules() if not module.name.startswith("_")]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [f"{package}.{module.name}" for module in pkgutil.iter_modules(folders or [])]


def _attribute(module: ModuleType, attribute: str, name: str, key: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = getattr(module, "__all__", None) or [
            own for own, value in vars(module).items()
            if isinstance(value, FunctionType | type) and value.__module__ == module.__name__
        ]  # fmt: skip
        raise QatkitError(
            f"'{name}': {module.__name__} has no '{attribute}'", key=key, advice=did_you_mean(attribute, names)
        ) from None
    except ImportError as error:  # a module that loads its names on use
        raise QatkitError(
            f"'{name}' cannot be loaded ({error})", key=key, advice="install the packages that the module needs"
        ) from error


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature, with annotations evaluated where possible; the others stay text and are not checked.

    An annotation may exist for type checkers only. It must not prevent the evaluation of the other annotations.
    """
    signature = inspect.signature(fn)
    code = inspect.unwrap(fn.__init__ if isinstance(fn, type) else fn)  # type: ignore[misc]
    names = getattr(code, "__globals__", {})

    def evaluated(annotation: Any) -> Any:
        if not isinstance(annotation, str):
            return annotation
        try:
            return eval(annotation, names)
        except Exception:
            return annotation

    parameters = [each.replace(annotation=evaluated(each.annotation)) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters)
