"""User-facing text uses the field's words: README, docs, help, docstrings, error messages and recipes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qatkit.cli.commands import COMMANDS
from qatkit.cli.main import app

ROOT = Path(__file__).parent.parent
CODE = [path for part in ("qatkit", "callbacks", "recipes") for path in sorted((ROOT / part).rglob("*.py"))]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]

# a word that is not the field's, and the one that is
REFUSED = {
    r"rounding to the grid": "fake quantization, quantize",
    r"whole numbers?": "integer",
    r"a scale for (each|every)": "per-tensor, per-channel, per-group, per-token",
    r"(watch|watches|watched|look at|looks at|looked at) (the )?(batches|data)": "calibrate",
    r"initialisers?": "PTQ method, starting point",
    r"weights alone": "weight-only",
    r"zeros that are held": "mask, pruned weights",
    r"(a|the|this|its|smaller|larger) shares?|shares? of": "fraction, ratio",
    r"spoil(s|ed|t)?": "non-finite",
    r"(what|as) (a|the|its) teachers? (say|says|said)|lessons?": "teacher outputs",
    r"(go|goes|went|gone|going) on where": "resume",
    r"how fast (it|they) answers?": "latency, throughput",
    r"deliver(s|ed|y|ies)?": "export",
    r"ship(s|ped|ping)?": "export",
}
PATTERN = re.compile("|".join(rf"(?P<w{index}>\b(?:{words})\b)" for index, words in enumerate(REFUSED)), re.IGNORECASE)
# text that may stay, and why
ALLOWED = {
    "what you train is what you ship": "the slogan",
    "Do not ship this file": "the alarm of a failed verification speaks of releasing the file",
}


def complaints(text: str) -> list[str]:
    for allowed in ALLOWED:
        text = re.sub(re.escape(allowed).replace(r"\ ", r"\s+"), "", text, flags=re.IGNORECASE)
    found = []
    for match in PATTERN.finditer(re.sub(r"\s+", " ", text)):
        assert match.lastgroup is not None
        found.append(f"{match[0]!r}: use {list(REFUSED.values())[int(match.lastgroup[1:])]}")
    return found


def prose(page: str) -> str:
    """The text of a page without code and without tables that are generated from recorded benchmark results."""
    page = re.sub(r"<!-- (table|targets): .*?<!-- end -->", "", page, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Docstrings, sentences under fields, and the strings of errors, warnings, log lines and table rows, with lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        elif isinstance(node, ast.Call) and SPEAKING.search(ast.unparse(node.func)):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


SPEAKING = re.compile(r"(Error|Warning|warn|warning|info|echo|with_fields|Row|Format|Method)$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_words_of_the_field(page: Path) -> None:
    text = page.read_text()
    if page.suffix == ".yaml":
        text = "\n".join(line.partition("#")[2] for line in text.splitlines())
    assert complaints(prose(text)) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_messages_use_the_words_of_the_field(path: Path) -> None:
    found = [f"line {line}: {said}" for line, text in texts(ast.parse(path.read_text())) for said in complaints(text)]
    assert found == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_uses_the_words_of_the_field(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert complaints(shown.output) == []


def test_a_refused_word_is_found_and_the_slogan_is_not() -> None:
    assert complaints("An initialiser looks at\nbatches.") == [
        "'initialiser': use PTQ method, starting point",
        "'looks at batches': use calibrate",
    ]
    assert not complaints("What you train is what you\nship: two layers share a weight.")
