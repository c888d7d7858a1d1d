"""Stored results of a benchmark that takes long: each is written when it is measured, and a stopped benchmark resumes.

Results of other settings, of another machine, or of other versions are refused instead of being mixed with new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Results by key in a JSON file, with what all of them depend on.

    Raises:
        SystemExit: the file's results depend on something else; its differing entries are named.
    """

    def __init__(self, path: Path, source: dict[str, Any]) -> None:
        self.path, self.source = path, json.loads(json.dumps(source))
        self.results: dict[str, Any] = {}
        if path.exists():
            content = json.loads(path.read_text())
            before: dict[str, Any] = content["source"]
            keys = sorted(key for key in before.keys() | source.keys() if before.get(key) != self.source.get(key))
            if keys:
                seen = "; ".join(f"{key} is {before.get(key)} and not {self.source.get(key)}" for key in keys)
                raise SystemExit(f"{path} was measured with other settings: {seen}. Delete it to start again.")
            self.results = content["results"]

    def store(self, key: str, result: Any) -> None:
        """Add a result and write the file, in one step: a killed process leaves the file before or after it."""
        self.results[key] = result
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"source": self.source, "results": self.results}, indent=1) + "\n")
        os.replace(draft, self.path)


def digest(*files: Path) -> str:
    """The beginning of a hash of the files' contents, for results that depend on their code."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]
