"""Sentences about parity and results, with numbers calculated by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qatkit.report.figures import interval
from qatkit.report.page import run_names
from qatkit.report.sentences import headline, parity, plain, tiles
from qatkit.report.tables import comparison

CHECK: dict[str, Any] = {
    "passed": True,
    "failures": [],
    "format": "onnx",
    "runtime": "ONNX Runtime",
    "layers": 4,
    "weights": 15248,
    "samples": 360,
    "allowed_error": 0.0035,
    "mean_error": 0.00004,
    "quantization_error": 0.0032,
    "agreement": 359 / 360,
    "task": "classification",
}


def test_parity_in_plain_words() -> None:
    said = parity(CHECK)
    assert said["headline"] == "ONNX Runtime computes what training computed."
    assert said["sentences"] == [
        "All 15,248 integer weights in the file's 4 quantized layers equal the trained ones.",
        "Outputs differ by 0.000040 on average, 1/80 of the change due to quantization (0.0032; the limit is 0.0035).",
        "Both models predict the same class for 359 of 360 test samples.",
    ]


def test_equal_outputs_noise_and_formats_without_a_bound_are_said_as_they_are() -> None:
    dense = {**CHECK, "format": "dense", "mean_error": 0.0, "allowed_error": 0.0}
    assert parity(dense)["sentences"][:2] == [
        "All 15,248 weights in the file's 4 quantized layers equal the trained ones.",
        "Outputs are bit-identical.",
    ]
    noise = {**CHECK, "layers": 0, "quantization_error": 0.0, "mean_error": 8.4e-7, "agreement": 1.0}
    assert parity(noise)["sentences"] == [
        "Outputs differ by 8.4e-7 on average, because of a different floating-point summation order "
        "(the limit is 0.0035).",
        "Both models predict the same class for all 360 test samples.",
    ]
    unbounded = parity({**CHECK, "allowed_error": None})["sentences"][1]
    assert unbounded.endswith("No limit applies, because this format does not quantize activations.")


def test_a_failure_is_told_with_every_difference_and_without_numbers_that_may_be_missing() -> None:
    failed = {**CHECK, "passed": False, "failures": ["one", "two"], "mean_error": None, "agreement": None}
    said = parity(failed)
    assert not said["passed"]
    assert "does NOT compute what training computed" in said["headline"]
    assert said["sentences"] == ["one", "two"]


def test_a_file_that_its_runtime_did_not_run_is_only_partly_verified() -> None:
    check = {
        **CHECK,
        "format": "mlx",
        "runtime": "PyTorch, decoding the MLX folder,",
        "not_run": "MLX",
        "mean_error": 0.0,
    }
    said = parity(check)
    assert said["headline"] == "The file contains what was trained, but MLX did not run."
    assert said["sentences"][:3] == [
        "All 15,248 weights in the file's 4 quantized layers equal the trained ones.",
        "PyTorch, decoding the MLX folder, computed the outputs. To run MLX, use `qatkit verify --python`.",
        "Outputs are bit-identical.",
    ]

    def row(file: str, check: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {
            "stage": file, "file": file, "kind": "dense", "bytes": 8, "latency": [], "layers": [],
            "format": check["format"], "test_accuracy": 0.5, "verification": {**check, "runtime_metric": 0.5} | changes,
        }  # fmt: skip

    report = {"rows": [row("lm", check)], "others": [row("lm/onnx", CHECK)], "baselines": [], "format": "mlx"}
    tile = tiles(report)[-1]
    assert (tile["value"], tile["state"]) == ("partly verified", "")
    assert tile["note"] == "all 2 files, reloaded from disk; MLX did not run: lm"
    cells = comparison(report)
    assert [(row[3], row[-1]) for row in cells] == [("did not run", "passed (MLX did not run)"), ("50.00%", "passed")]
    report["rows"] = [row("lm", check, passed=False)]
    assert (tiles(report)[-1]["value"], comparison(report)[0][-1]) == ("FAILED", "FAILED")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.346, "0.35"), (3.6e-5, "0.000036"), (8e-7, "8e-7"), (12.3, "12"), (2.0, "2.0")]
)
def test_numbers_have_two_digits(number: float, text: str) -> None:
    assert plain(number) == text


def test_the_headline_compares_the_last_row_with_the_first() -> None:
    def row(kind: str, size: int, accuracy: float) -> dict[str, Any]:
        return {"kind": kind, "bytes": size, "test_accuracy": accuracy, "verification": CHECK}

    first, last = row("dense", 64_000, 0.99), row("trained", 16_000, 0.985)
    assert headline({"rows": [first, last]}) == (
        "4.0 times smaller than the dense model (16.0 kB instead of 64.0 kB), "
        "at 98.50% test accuracy instead of 99.00%."
    )
    assert headline({"rows": [first, {**last, "bytes": 65_000}]}).startswith(
        "about as large as the dense model (65.0 kB"
    )
    assert headline({"rows": [first, {**last, "bytes": 96_000}]}).startswith("1.5 times larger than the dense model")
    assert headline({"rows": [first]}) == "99.00% test accuracy in 64.0 kB; nothing was compressed."


def test_a_language_model_is_judged_by_its_perplexity() -> None:
    def row(stage: str, kind: str, size: int, loss: float) -> dict[str, Any]:
        check = {**CHECK, "samples": 92_000, "task": "causal"}
        return {
            "stage": stage, "kind": kind, "bytes": size, "test_accuracy": 0.4, "test_loss": loss,
            "test_perplexity": math.exp(loss), "file": stage, "latency": [], "verification": check,
        }  # fmt: skip

    report = {"rows": [row("dense", "dense", 8_000_000, 2.0), row("qat", "trained", 2_000_000, 2.1)], "others": []}
    assert headline(report) == (
        "4.0 times smaller than the dense model (2.0 MB instead of 8.0 MB), at 8.166 test perplexity instead of 7.389."
    )
    first, size, agree = tiles(report)
    assert (first["label"], first["value"]) == ("perplexity of qat", "8.166")
    # exp(0.1) - 1
    assert first["note"] == "+10.52% compared with dense; over 92,000 test tokens, mean loss 2.100"
    assert (size["value"], agree["value"]) == ("4.00x", "verified")
    same = parity(report["rows"][0]["verification"])["sentences"][-1]
    assert same == "Both models predict the same next token for 91,744 of 92,000 test tokens."


def test_wilson_interval_of_the_literature() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81 of 263 and 0 of 20
    assert interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_runs_of_one_name_are_told_apart_by_what_differs_in_their_folders() -> None:
    folders = [Path("a/run"), Path("b/run"), Path("c/other")]
    assert run_names(["x", "x", "x"], folders) == ["x (a/run)", "x (b/run)", "x (c/other)"]
    assert run_names(["x", "y", "z"], folders) == ["x", "y", "z"]
