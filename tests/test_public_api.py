"""What `import qatkit` offers: its list of names, `dir()` and a star import agree."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import qatkit


def test_the_list_of_names_dir_and_a_star_import_agree() -> None:
    assert qatkit.__all__ == sorted(qatkit.__all__)
    assert [name for name in dir(qatkit) if not name.startswith("_")] == qatkit.__all__
    names: dict[str, Any] = {}
    exec("from qatkit import *", names)
    assert set(names) - {"__builtins__"} == set(qatkit.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    code = "import qatkit; print(hasattr(qatkit, 'quantise'), hasattr(qatkit, 'quantize'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False True\n"


PACKAGES = ["qatkit", *(f"qatkit.{name}" for name in (
    "data", "models", "tasks", "quantization", "pruning", "distillation", "lora", "export", "callbacks", "recipe",
))]  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_that_of_a_module_beside_it(package: str) -> None:
    """Importing the module would replace the name in its package: a recipe's factory would become a module."""
    module = importlib.import_module(package)
    beside = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert not beside & set(module.__all__)
