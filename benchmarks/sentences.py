"""Sentences that need no download: docstrings of Python packages, and the topics of Python's help."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from qatkit.data.stdlib import stdlib_files

CACHE = Path(__file__).parent.parent / "build" / "encoder" / "sentences.json"
LIBRARIES = ("numpy", "scipy", "sklearn", "pandas", "sympy", "networkx", "torch")
"""Packages whose docstrings are read besides those of the standard library; qatkit's dependencies install them."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,.;'\"()/%?!-]+\.")


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts: the docstrings of each module, and the topics of Python's help."""
    yield from ((f"topic {name}", text) for name, text in topics.items())
    files = {f"stdlib {name}": path for name, path in stdlib_files().items()}
    for package in LIBRARIES:
        found = find_spec(package)
        assert found is not None
        assert found.origin is not None
        root = Path(found.origin).parent
        files |= {
            f"{package} {path.relative_to(root)}": path
            for path in root.rglob("*.py")
            if "tests" not in path.relative_to(root).parts
        }
    for name, path in files.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nodes = ast.walk(ast.parse(path.read_bytes()))
        except SyntaxError:
            continue
        documented = (n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        yield name, "\n\n".join(filter(None, map(ast.get_docstring, documented)))


def sentences_in(text: str) -> Iterator[str]:
    """Plain sentences of 6 to 30 words."""
    for paragraph in re.split(r"\n\s*\n", text):
        if "---" in paragraph or "===" in paragraph or ">>>" in paragraph:
            continue
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if 6 <= len(sentence.split()) <= 30 and PLAIN.fullmatch(sentence) and letters > 0.9 * len(sentence):
                yield sentence


@cache
def sentences(all_of_them: bool) -> dict[str, list[str]]:
    """Sentences by split, "train", "tuning" and "held-out", in random order.

    Whole documents are split by a hash of their names, and no sentence occurs in two splits.

    Args:
        all_of_them: Read docstrings too, which takes minutes the first time; if not, only the topics of Python's help.
    """
    if all_of_them and CACHE.exists():  # made in minutes
        loaded: dict[str, list[str]] = json.loads(CACHE.read_text())
        return loaded
    found: dict[str, set[str]] = {"train": set(), "tuning": set(), "held-out": set()}
    for name, text in documents() if all_of_them else topics.items():
        position = hashlib.sha256(name.encode()).digest()[0] / 256
        split = "held-out" if position < 0.1 else "tuning" if position < 0.2 else "train"
        found[split] |= set(sentences_in(text))
    found["tuning"] -= found["train"]
    found["held-out"] -= found["train"] | found["tuning"]
    lists = {split: sorted(found[split]) for split in found}
    for split in lists:
        random.Random(0).shuffle(lists[split])
    if all_of_them:
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        CACHE.write_text(json.dumps(lists))
    return lists
