"""Lazy exports: public names of a package load their module on first use, so importing the package is cheap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` for a package's ``__init__.py``.

    Args:
        package: Its ``__name__``.
        homes: Maps full module names to the names that each exports.

    Example:
        >>> names, getter, directory = lazy_exports("qatkit", {"qatkit.errors": ["QatkitError"]})
        >>> names, getter("QatkitError").__name__
        (['QatkitError'], 'QatkitError')
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value = getattr(importlib.import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)  # the next lookup finds it directly
        return value

    def directory() -> list[str]:
        return sorted({*home_of, *(name for name in vars(sys.modules[package]) if name.startswith("__"))})

    return sorted(home_of), load, directory
