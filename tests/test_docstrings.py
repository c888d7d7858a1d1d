"""Every example in a docstring runs and prints what the docstring shows."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(([] if part == "qatkit" else ["qatkit"]) + list(path.relative_to(ROOT).with_suffix("").parts)): path
    for part in ("qatkit", "callbacks")
    for path in sorted((ROOT / part).rglob("*.py"))
}
WITH_EXAMPLES = [name.removesuffix(".__init__") for name, path in MODULES.items() if ">>> " in path.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_the_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests, "the file shows an example, but no docstring of its module holds it"
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
