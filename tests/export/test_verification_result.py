"""The result of a verification, computed by hand: its fields, its bounds and its text."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat, strip_qat
from qatkit.export.dense import export_dense
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, Measured, ReadBack
from qatkit.export.judges import MetricJudge, TaskJudge
from qatkit.export.outputs import Output, Outputs
from qatkit.export.verification import Verification, _beyond, _mean_bound, _measured, _summary, judge_of, verify
from qatkit.tasks import TASKS

X, LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 1])


@pytest.fixture
def model() -> nn.Module:
    """A layer with two classes, which int4 changes by one value: 0.25 becomes 2 / 7."""
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.25], [0.0, 1.0]]))
    model = nn.Sequential(layer)
    prepare_qat(model, QuantSpec(4))
    return model


def test_every_field_of_a_verification_is_what_its_name_says(model: nn.Module, tmp_path: Path) -> None:
    export_dense(model, tmp_path / "model.safetensors")
    found = asdict(verify(model, tmp_path / "model.safetensors", [(X[:2], LABELS[:2]), (X[2:], LABELS[2:])]))
    assert found.pop("quantization_error") == pytest.approx(2 * (2 / 7 - 1 / 4) / 6, rel=1e-5)
    assert found == {
        "passed": True,
        "failures": [],
        "format": "dense",
        "runtime": "PyTorch, reading the dense file,",
        "not_run": "",
        "layers": 1,
        "weights": 4,
        "samples": 3,
        "bound": "exactly equal outputs: 0",
        "allowed_error": 0.0,
        "mean_error": 0.0,
        "max_error": 0.0,
        "agreement": 1.0,
        "task": "classification",
        "metric": "accuracy",
        "trained_metric": pytest.approx(2 / 3),
        "runtime_metric": pytest.approx(2 / 3),
        "text": "passed: all 4 weights of 1 quantized layers match the trained ones; over 3 test samples, outputs "
        "differ by 0 on average (bound: exactly equal outputs, 0); the accuracy is 0.6667 (trained: 0.6667)",
    }


def test_outputs_without_a_bound_have_no_allowed_error(model: nn.Module, tmp_path: Path) -> None:
    strip_qat(model)
    prepare_qat(model, QuantSpec(4), QuantSpec(8, symmetric=False, strategy="tensor"))
    calibrate(model, [X])
    export_dense(model, tmp_path / "model.safetensors")
    found = verify(model, tmp_path / "model.safetensors", [(X, LABELS)])
    assert (found.passed, found.allowed_error) == (True, None)
    assert found.bound == "none, since the file does not quantize activations"


def test_additional_failures_follow_the_first_ones(model: nn.Module, tmp_path: Path) -> None:
    export_dense(model, tmp_path / "model.safetensors")
    passed = verify(model, tmp_path / "model.safetensors", [(X, LABELS)])
    assert passed.with_failures([]) is passed
    failed = passed.with_failures(["one"])
    assert failed == replace(passed, passed=False, failures=["one"], text="FAILED: one")
    more = failed.with_failures(["two", "three"])
    assert more == replace(failed, failures=["one", "two", "three"], text="FAILED: one (and 2 more)")
    assert failed.with_failures(["two"]).summary() == "FAILED: one (and 1 more)"
    assert isinstance(more, Verification)


def test_a_bound_is_computed_from_means() -> None:
    output = Output(values=4, magnitude=6.0, measured=2, quantization=3.0, rounding=1.0, error=9.0)
    assert _measured(output, True, nn.Linear(2, 2)) == Measured(
        quantizes_inputs=True,
        half_precision=False,
        quantization_error=1.5,
        mean_output=1.5,
        whole=False,
        rounding_error=0.25,
    )
    one = Output(values=1, magnitude=6.0, measured=1, quantization=3.0, rounding=1.0, whole=True)
    assert _measured(one, False, nn.Linear(2, 2)) == Measured(
        quantizes_inputs=False,
        half_precision=False,
        quantization_error=3.0,
        mean_output=6.0,
        whole=True,
        rounding_error=1.0,
    )
    assert _measured(Output(), False, nn.Linear(2, 2)) == Measured(False, False, 0.0, 0.0)


@pytest.mark.parametrize(("dtype", "half"), [(torch.float16, True), (torch.bfloat16, True), (torch.float64, False)])
def test_one_parameter_in_half_precision_makes_a_model_half_precision(dtype: torch.dtype, half: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    assert _measured(Output(), True, model).half_precision is half


def outputs(each: dict[str, Output], **fields: Any) -> Outputs:
    values = {"samples": 5, "counted": "samples", "task": "", "metric": "accuracy", "trained_metric": 0.5, "ran": True}
    return Outputs(**{**values, "each": each, **fields})


def test_a_mean_difference_at_the_bound_passes_and_one_above_it_fails() -> None:
    bounds = {"": Bound("1% of the values", 0.5)}
    assert _beyond(bounds, outputs({"": Output(values=1, error=0.5)})) == []
    assert _beyond(bounds, outputs({"": Output()})) == []
    above = {"": Output(values=2, error=1.5, largest=1.25)}
    text = (
        "outputs: the mean difference from the trained model is 0.75, but the bound (1% of the values) is 0.5 (largest "
        "difference 1.25, over 5 samples"
    )
    assert _beyond(bounds, outputs(above)) == [f"{text})"]
    assert _beyond(bounds, outputs(above, not_in_float64="TypeError: float32 only")) == [
        f"{text}; the effect of rounding is unknown, because the model fails in float64: TypeError: float32 only)"
    ]
    assert _beyond(bounds, outputs(above, ran=False)) == []
    assert _beyond({"": Bound("not bounded", None)}, outputs(above)) == []
    assert len(_beyond(bounds, outputs({"": Output(values=1, error=float("nan"))}))) == 1


def test_each_output_has_its_own_bound_and_failures_name_it() -> None:
    each = {name: Output(values=1, error=1.0) for name in ("free", "boxes", "scores", "exact")}
    bounds = {"free": Bound("none", None), "boxes": Bound("a", 0.5), "scores": Bound("b", 2.0), "exact": Bound("c", 0)}
    assert [failure[:51] for failure in _beyond(bounds, outputs(each))] == [
        "outputs: the mean difference of 'boxes' from the tr",
        "outputs: the mean difference of 'exact' from the tr",
    ]
    assert "of 'boxes' from" in _beyond(bounds, outputs({"boxes": each["boxes"], "scores": each["scores"]}))[0]


def test_the_limit_of_the_mean_error_weighs_each_bound_by_its_values() -> None:
    each = {"a": Output(values=1), "b": Output(values=3)}
    assert _mean_bound({"a": Bound("x", 4.0), "b": Bound("y", 2.0)}, outputs(each)) == Bound(
        "a limit for each output", 2.5
    )
    assert _mean_bound({"a": Bound("x", 4.0), "b": Bound("x", 2.0)}, outputs(each)) == Bound("x", 2.5)
    assert _mean_bound({"a": Bound("x", 4.0), "b": Bound("y", None)}, outputs(each)) == Bound(
        "a limit for each output", None
    )
    assert _mean_bound({"a": Bound("x", 4.0)}, outputs({"a": Output(values=1)})) == Bound("x", 4.0)
    assert _mean_bound({"a": Bound("x", 4.0)}, outputs({"a": Output()})) == Bound("x", 0.0)


def test_a_class_dimension_needs_a_metric() -> None:
    with pytest.raises(QatkitError) as caught:
        judge_of(None, None, 1)
    assert str(caught.value) == (
        "class_dim: 1 has no effect without a metric, because tasks define their class dimension; also pass metric, or "
        "remove class_dim"
    )


def test_the_metric_or_the_task_scores_the_outputs() -> None:
    judge = judge_of("regression", torchmetrics.MeanSquaredError(), 1)
    assert isinstance(judge, MetricJudge)
    assert (type(judge.metric), judge.class_dim) == (torchmetrics.MeanSquaredError, 1)
    for task, expected in (
        ("regression", TASKS["regression"]),
        (TASKS["regression"], TASKS["regression"]),
        (None, None),
    ):
        judge = judge_of(task, None, None)
        assert isinstance(judge, TaskJudge)
        assert judge.declared is expected
    with pytest.raises(QatkitError, match=r"^task: "):
        judge_of("grading", None, None)


def test_the_text_of_a_result_has_its_numbers() -> None:
    passed = outputs({"": Output(values=8, error=1.0)}, runtime_metric=0.25)
    row, rest = FORMATS["dense"], "the accuracy is 0.2500 (trained: 0.5000)"
    assert _summary([], ReadBack(4, [], None), row, 0, Bound("x", 0.5), passed) == (
        f"passed: over 5 samples, outputs differ by 0.12 on average (bound: x, 0.5); {rest}"
    )
    assert _summary([], ReadBack(4, [], None), row, 2, Bound("not bounded", None), passed) == (
        "passed: all 4 weights of 2 quantized layers match the trained ones; over 5 samples, outputs differ by 0.12 on "
        f"average (bound: not bounded); {rest}"
    )
    assert _summary(["no"], ReadBack(4, [], None), row, 2, Bound("x", 0.5), outputs({}, ran=False)) == "FAILED: no"
