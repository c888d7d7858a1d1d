"""Collect what `qatkit advise` quotes from the benchmark results; `python benchmarks/tables.py` writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "qatkit" / "advise" / "evidence.json"
# What each row of the results is evidence for. None: not what a plan of `qatkit advise` does.
METHODS = {"RTN": "PTQ", "GPTQ": "PTQ, GPTQ", "QAT + KD": "QAT + KD"}
METHODS |= dict.fromkeys(
    [
        "-", "dense trained further", "dense trained further + KD", "QAT", "torchao QAT", "AWQ", "SmoothQuant",
        "QAT + KD from rtn", "QAT + KD from gptq", "QAT + KD from awq", "QAT + KD from smoothquant",
    ]
)  # fmt: skip
STUDENTS = {"vision/digits_distill": "convolutional", "llm/distill_layers": "language"}
DIGITS = {"digits_resnet": "W8A8", "digits_int8": "W8A8", "digits_int4": "W4A8", "digits_int2": "W2A8"}
"""The format of each recipe."""
DIGITS_METHODS = {"PTQ": "PTQ", "QAT": "QAT + KD", "dense": None, "`quantize_static` of ONNX Runtime": None}
FAMILIES = {
    "MLP": "mlp", "CNN": "convolutional", "ResNet": "convolutional", "DenseNet": "convolutional",
    "MobileNetV3": "convolutional", "ViT": "encoder", "BERT": "encoder",
    "MiniLM": None,  # a cosine, not an accuracy
    "LSTM": None,
}  # fmt: skip
FILES = {
    "W8A8": {"static": "quantize_static of ONNX Runtime", "qatkit": "QAT + KD", "dynamic": None, "fp32": None},
    "W8A8 dynamic": {"dynamic": "quantize_dynamic of ONNX Runtime", "qatkit": "QAT + KD", "static": None, "fp32": None},
}
"""The method of each file, by the format of its model."""


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


def _known(table: dict[Any, Any], key: Any, results: str) -> Any:
    """The entry of a table, None if the row is no evidence for any plan.

    Raises:
        SystemExit: the table has no such entry, so nobody has decided whether the row is evidence.
    """
    if key not in table:
        raise SystemExit(f"benchmarks/evidence.py: add {key!r} of results/{results}.json to its table, or None")
    return table[key]


def _language() -> Iterator[dict[str, Any]]:
    for row in _rows("qat_recovery"):
        method = _known(METHODS, row["method"], "qat_recovery")
        if method is not None and row["format"] != "dense":
            difference = row["difference from baseline"]
            loss = 100 * (math.exp(_number(difference)) - 1)
            shown = f"held-out loss {row['held-out loss']}, {difference} compared with the dense model"
            yield _row("language", row["format"], method, loss, shown, "qat_recovery")


def _smaller() -> Iterator[dict[str, Any]]:
    for row in _rows("distill_recipes"):
        family = _known(STUDENTS, row["recipe"], "distill_recipes")
        teacher, student = _number(row["teacher"]), _number(row["student with teacher"])
        loss = 100 * (math.exp(student - teacher) - 1) if family == "language" else teacher - student
        shown = f"{row['recipe']}: {row['metric']} {row['student with teacher']}, teacher {row['teacher']}"
        yield _row(family, "smaller model", "KD", loss, shown, "distill_recipes")


def _digits() -> Iterator[dict[str, Any]]:
    rows = _rows("digits")
    dense = {name: row for row in rows if row["method"] == "dense" for name in row["recipe"].split(", ")}
    for row in rows:
        method = _known(DIGITS_METHODS, row["method"], "digits")
        if method is not None:
            format, first = _known(DIGITS, row["recipe"], "digits"), dense[row["recipe"]]["test accuracy"]
            loss = _number(first) - _number(row["test accuracy"])
            shown = f"{row['recipe']}: test accuracy {row['test accuracy']}, dense {first}"
            yield _row("convolutional", format, method, loss, shown, "digits")


def _served() -> Iterator[dict[str, Any]]:
    dense = {}
    for row in _rows("serve_avx2"):
        family, runtime = _known(FAMILIES, row["model"], "serve_avx2"), row.get("runtime", "ONNX Runtime")
        (accuracy,) = (value for key, value in row.items() if key.startswith("accuracy"))
        if row["file"] == "fp32":
            dense[row["model"], runtime] = accuracy
        format = "W8A8 dynamic" if (family, runtime) == ("encoder", "ONNX Runtime") else "W8A8"
        method = _known(FILES[format], row["file"], "serve_avx2")
        if family is None or method is None or accuracy == "not loaded":
            continue
        first = dense[row["model"], runtime]
        shown = f"{row['model']} in {runtime}: test accuracy {accuracy}, dense {first}"
        yield _row(family, format, method, _number(first) - _number(accuracy), shown, "serve")


def _number(shown: str) -> float:
    return float(shown.split()[0].rstrip("%"))
