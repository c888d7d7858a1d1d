"""A hook of mkdocs that writes the API reference: every public name of each package, and `--help` of every command."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "qatkit": "qatkit",
    "callbacks": "qatkit.callbacks",
    "quantization": "qatkit.quantization",
    "pruning": "qatkit.pruning",
    "distillation": "qatkit.distillation",
    "lora": "qatkit.lora",
    "models": "qatkit.models",
    "data": "qatkit.data",
    "export": "qatkit.export",
    "recipe": "qatkit.recipe",
}


ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "build" / "reference"  # `paths` of mkdocstrings in mkdocs.yml


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package in its installed shape before mkdocstrings looks for it, with headings that it knows."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for folder, installed in (("qatkit", "qatkit"), ("callbacks", "qatkit/callbacks")):
        shutil.copytree(ROOT / folder, SOURCE / installed, ignore=shutil.ignore_patterns("__pycache__"))
    for path in SOURCE.rglob("*.py"):
        path.write_text(re.sub(r"^( *)Example:$", r"\1Examples:", path.read_text(), flags=re.MULTILINE))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages. A name that several packages export is described once, by the most specific package."""
    described: set[str] = set()
    for page, package in reversed(PACKAGES.items()):
        files.append(File.generated(config, f"reference/{page}.md", content=reference(package, described)))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def reference(package: str, described: set[str]) -> str:
    """A page for mkdocstrings with each public name of a package, at the module that defines it."""
    module = importlib.import_module(package)
    names = {name: f"{home(getattr(module, name), package)}.{name}" for name in module.__all__}
    elsewhere = [f"- [`{name}`][{path}]" for name, path in names.items() if path in described]
    entries = [f"::: {path}" for path in names.values() if path not in described]
    described.update(names.values())
    summary = (module.__doc__ or "").split("\n\n")[0].strip()
    more = ["Described in the package that defines them:", "\n".join(elsewhere)] if elsewhere else []
    return "\n\n".join([f"# {package}", summary, *more, *entries]) + "\n"


def home(value: Any, package: str) -> str:
    """The module that defines a class or a function; the package for every other value, which does not know it."""
    defined = value.__module__ if inspect.isclass(value) or inspect.isroutine(value) else package
    return defined if defined.startswith("qatkit") else package


def command_line() -> str:
    """A page with the help text of `qatkit` and of each of its commands, as the terminal shows it."""
    from typer.testing import CliRunner

    from qatkit.cli.commands import COMMANDS
    from qatkit.cli.main import app

    def sections() -> Iterator[str]:
        for words in ([], *([name] for name in COMMANDS)):
            plain = {"COLUMNS": "100", "TERM": "dumb"}
            shown = CliRunner().invoke(app, [*words, "--help"], env=plain, prog_name="qatkit")
            assert shown.exit_code == 0, shown.output
            yield f"## {' '.join(['qatkit', *words])}\n\n```text\n{shown.output.strip()}\n```\n"

    return "# Command line\n\n" + "\n".join(sections())
