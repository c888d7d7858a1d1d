"""Common parts of all benchmarks: a table on the terminal, a JSON file with versions, and claims that can fail.

A script collects rows (one dict each, with the same keys) and claims, and ends with `finish(...)`.
`benchmarks/tables.py` writes the numbers in README and docs from the JSON files.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "qatkit",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "onnxruntime",
    "scikit-learn",
    "torchao",
    "liger-kernel",
)
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8", "asimddp", "i8mm", "sve")
"""Instruction sets that decide which kernels a runtime has."""


@dataclass(frozen=True)
class Claim:
    """A target of the project with its measured value."""

    text: str
    target: str
    measured: str
    holds: bool


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of percentages, such as ``98.61 ± 0.20 %``."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values) * 100:.2f} ± {deviation * 100:.2f}%"


def finish(
    name: str, rows: list[dict[str, Any]], claims: list[Claim], seeds: Sequence[int] = (), script: str | None = None
) -> None:
    """Print the table and the claims, write ``results/<name>.json``, and exit with 1 if a claim does not hold.

    Args:
        name: The name of the results.
        rows: The table, with the same keys in every row.
        claims: The targets.
        seeds: The seeds.
        script: The name of the script, if it differs from that of the results.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=name)
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for claim in claims:
        console.print(f"{'holds ' if claim.holds else 'FAILS '} {claim.text}: {claim.measured} (target {claim.target})")
    content = {
        "name": name,
        "script": script or name,
        "rows": rows,
        "claims": [asdict(claim) for claim in claims],
        "seeds": list(seeds),
        "machine": machine(),
        "versions": {package: _version(package) for package in PACKAGES if _version(package)},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: benchmarks/results/{name}.json")
    sys.exit(0 if all(claim.holds for claim in claims) else 1)


def machine() -> dict[str, Any]:
    """The processor, with its `FLAGS`."""
    found: dict[str, Any] = {
        "cpus": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()
    }  # fmt: skip
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    fields = dict(map(_field, lines))
    flags = fields.get("flags", fields.get("Features", "")).split()
    return found | {"processor": fields.get("model name", ""), "flags": [flag for flag in FLAGS if flag in flags]}


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
