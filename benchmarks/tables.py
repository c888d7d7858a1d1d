"""Write the tables in README and docs from the results of the benchmarks.

Run: python benchmarks/tables.py [--check]

The text between ``<!-- table: NAME -->`` and ``<!-- end -->`` in a page is replaced by the rows of
``results/NAME.json``. With ``targets:`` instead of ``table:``, it is replaced by the targets and the measured values.
The data file of `qatkit advise` is written from the results too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import evidence

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"(<!-- (table|targets): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """The rows of one benchmark as Markdown, followed by versions, seeds and machine."""
    content = _result(name)
    lines = _lines(content["rows"])
    versions = ", ".join(f"{package} {number}" for package, number in content["versions"].items())
    numbers = content["seeds"]
    seeds = f", seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else ""
    machine = content["machine"]
    processor = f" ({machine['processor']}: {', '.join(machine['flags'])})" if "processor" in machine else ""
    script = content.get("script", name)
    made = f"`python benchmarks/{script}.py`: {machine['cpus']} CPU cores{processor}{seeds}; {versions}."
    return "\n".join([*lines, "", made, ""])


def targets(name: str) -> str:
    """Targets of one benchmark with measured values; a missed target stays in the list."""
    claims = _result(name)["claims"]
    words = ("target", "required", "measured", "")
    rows = [(c["text"], c["target"], c["measured"], "" if c["holds"] else "**missed**") for c in claims]
    return "\n".join([*_lines([dict(zip(words, row, strict=True)) for row in rows]), ""])


def _result(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "results" / f"{name}.json").read_text())
    return content


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return lines + ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


WRITERS = {"table": table, "targets": targets}


def main(check: bool) -> int:
    stale = []
    if not evidence.TARGET.exists() or evidence.TARGET.read_text() != evidence.text():
        stale.append(evidence.TARGET.name)
        if not check:
            evidence.TARGET.write_text(evidence.text())
    for page in PAGES:
        text = page.read_text()
        written = MARK.sub(lambda found: found[1] + WRITERS[found[2]](found[3]) + found[5], text)
        if written != text:
            stale.append(page.name)
            if not check:
                page.write_text(written)
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
