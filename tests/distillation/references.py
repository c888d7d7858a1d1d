"""What other libraries compute for `tests.distillation.tensors`; benchmarks/kd_references.py writes the numbers."""

from __future__ import annotations

import json
from pathlib import Path

REFERENCES: dict[str, float] = json.loads((Path(__file__).parent / "references.json").read_text())["values"]
