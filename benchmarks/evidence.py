"""Collect what `qatkit advise` quotes from the benchmark results; `python benchmarks/tables.py` writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "qatkit" / "advise" / "evidence.json"
METHODS = {"RTN": "PTQ", "GPTQ": "PTQ, GPTQ", "QAT + KD": "QAT + KD"}
FAMILIES = {"MLP": "mlp", "CNN": "convolutional", "ResNet": "convolutional"}


def text() -> str:
    """Return the content of the data file: one row per measured format and method, with its loss in percent."""
    rows = [*_language(), *_smaller(), *_digits(), *_served()]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    return rows


def _row(family: str, format: str, method: str, loss: float, shown: str, benchmark: str) -> dict[str, Any]:
    return {
        "family": family, "format": format, "method": method, "loss": round(loss, 3), "shown": shown,
        "benchmark": f"benchmarks/{benchmark}.py",
    }  # fmt: skip


def _language() -> Iterator[dict[str, Any]]:
    for row in _rows("qat_recovery"):
        if row["method"] in METHODS and row["format"] != "dense":
            difference = row["difference from baseline"]
            loss = 100 * (math.exp(_number(difference)) - 1)
            shown = f"held-out loss {row['held-out loss']}, {difference} compared with the dense model"
            yield _row("language", row["format"], METHODS[row["method"]], loss, shown, "qat_recovery")


def _smaller() -> Iterator[dict[str, Any]]:
    for row in _rows("distill_recipes"):
        teacher, student = _number(row["teacher"]), _number(row["student with teacher"])
        language = row["recipe"].startswith("llm/")
        loss = 100 * (math.exp(student - teacher) - 1) if language else teacher - student
        shown = f"{row['recipe']}: {row['metric']} {row['student with teacher']}, teacher {row['teacher']}"
        family = "language" if language else "convolutional"
        yield _row(family, "smaller model", "KD", loss, shown, "distill_recipes")


def _digits() -> Iterator[dict[str, Any]]:
    formats = {"digits_int8": "W8A8", "digits_int4": "W4A8", "digits_int2": "W2A8"}
    dense = next(row for row in _rows("digits") if row["method"] == "dense" and "digits_int8" in row["recipe"])
    methods = {"PTQ": "PTQ", "QAT": "QAT + KD"}
    for row in _rows("digits"):
        if row["recipe"] in formats and row["method"] in methods:
            loss = _number(dense["test accuracy"]) - _number(row["test accuracy"])
            shown = f"{row['recipe']}: test accuracy {row['test accuracy']}, dense {dense['test accuracy']}"
            yield _row("convolutional", formats[row["recipe"]], methods[row["method"]], loss, shown, "digits")


def _served() -> Iterator[dict[str, Any]]:
    rows = [row for row in _rows("serve") if row["model"] in FAMILIES and row.get("accuracy")]
    dense = {row["model"]: row["accuracy"] for row in rows if row["file"] == "fp32"}
    methods = {"static": "PTQ", "qatkit": "QAT + KD"}
    for row in rows:
        if row["file"] in methods:
            loss = _number(dense[row["model"]]) - _number(row["accuracy"])
            shown = f"{row['model']}: test accuracy {row['accuracy']}, dense {dense[row['model']]}"
            yield _row(FAMILIES[row["model"]], "W8A8", methods[row["file"]], loss, shown, "serve")


def _number(shown: str) -> float:
    return float(shown.split()[0].rstrip("%"))
