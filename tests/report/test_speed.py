"""Sentences about slower files and floating-point layers in the report."""

from __future__ import annotations

from typing import Any

from qatkit.report.speed import float_words, kernel_notes, missing_baselines, slowdowns


def latency(*milliseconds: float) -> list[dict[str, float]]:
    return [
        {"batch_size": size, "low_ms": 0.95 * each, "median_ms": each, "high_ms": 1.05 * each}
        for size, each in zip((1, 64), milliseconds, strict=True)
    ]


def row(stage: str, times: list[dict[str, float]], layers: int = 0, **kernels: Any) -> dict[str, Any]:
    counts = {"integer": {}, "floating": {}, "reasons": {}, "weight_only": {}} | kernels
    return {
        "stage": stage, "file": stage, "format": "onnx", "latency": times, "layers": [{}] * layers, "kernels": counts
    }  # fmt: skip


def report(rows: list[dict[str, Any]], *baselines: dict[str, Any], others: Any = ()) -> dict[str, Any]:
    return {"format": "onnx", "rows": rows, "others": list(others), "baselines": list(baselines)}


def baseline(times: list[dict[str, float]]) -> dict[str, Any]:
    return {"name": "quantize_static", "failure": "", "latency": times}


def test_a_file_slower_than_the_dense_one_or_the_free_one_is_named_with_batch_and_ratio() -> None:
    rows = [row("dense", latency(1.0, 10.0)), row("qat", latency(2.0, 8.0), layers=1)]
    assert slowdowns(report(rows, baseline(latency(0.5, 4.0)))) == [
        "qat is slower than dense: 0.50x at a batch of 1",
        "qat is slower than quantize_static: 0.25x at a batch of 1, 0.50x at a batch of 64",
    ]


def test_overlapping_quartiles_are_not_called_slower() -> None:
    rows = [row("dense", latency(1.0, 10.0)), row("qat", latency(1.08, 10.8), layers=1)]
    assert slowdowns(report(rows)) == []


def test_a_run_that_quantized_nothing_is_not_compared() -> None:
    rows = [row("dense", latency(1.0, 10.0)), row("pruned", latency(2.0, 20.0))]
    assert slowdowns(report(rows)) == []


def test_layers_in_floating_point_are_named_with_the_reason() -> None:
    kernels = {
        "integer": {"QLinearConv": 3},
        "floating": {"Conv": 7},
        "reasons": {"the input is not quantized": list("abcdefg")},
    }
    rows = [row("dense", []), row("qat", [], layers=1, **kernels)]
    assert kernel_notes({"rows": rows, "others": []}) == [
        "qat: 7 of 10 matrix products run in floating point (7 Conv; the input is not quantized: a, b, c, d, e and "
        "2 more); see docs/runtimes.md"
    ]
    assert float_words({"floating": {"Gemm": 1}, "reasons": {}}) == "1 Gemm"


def test_a_baseline_that_failed_is_reported_with_the_reason() -> None:
    failed = {"name": "ONNX Runtime", "failure": "quantize_static fails: no shapes"}
    assert missing_baselines({"baselines": [failed]}) == [
        "no comparison with ONNX Runtime's own quantization: quantize_static fails: no shapes"
    ]


def test_a_slow_quantized_stage_is_named_although_a_dense_one_follows() -> None:
    rows = [row("dense", latency(1.0, 10.0)), row("qat", latency(2.0, 8.0), layers=1), row("dense2", latency(1.0, 1.0))]
    assert slowdowns(report(rows)) == ["qat is slower than dense: 0.50x at a batch of 1"]


def test_every_format_is_compared_on_its_own_and_baselines_are_of_the_main_one() -> None:
    main = [row("dense", []), row("qat", [], layers=1)]
    others = [
        row("dense", latency(1.0, 10.0)) | {"file": "dense/openvino", "format": "openvino"},
        row("qat", latency(2.0, 8.0), layers=1) | {"file": "qat/openvino", "format": "openvino"},
    ]
    assert slowdowns(report(main, others=others)) == [
        "qat/openvino is slower than dense/openvino: 0.50x at a batch of 1"
    ]
    fast = [row("dense", latency(1.0, 10.0)), row("qat", latency(0.5, 5.0), layers=1)]
    free = baseline(latency(0.1, 20.0))
    assert slowdowns(report(fast, free, others=others)) == [
        "qat is slower than quantize_static: 0.20x at a batch of 1",
        "qat/openvino is slower than dense/openvino: 0.50x at a batch of 1",
    ]
