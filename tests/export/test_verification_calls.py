"""What a verification calls, on a format that records its arguments and whose file differs by known amounts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.export.interface import Bound, InputError, Measured, ReadBack
from qatkit.export.verification import verify

RECORDED = ExportFormat(
    name="recorded",
    description="a file that nothing reads",
    file_name="model.recorded",
    check="",
    write="",
    read_back=f"{__name__}:read_back",
    bound=f"{__name__}:bound",
    runtime="The recorder",
    rounding=f"{__name__}:rounding",
)
X, LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1, 1])
calls: list[Any] = []


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """A runtime that returns the negative outputs."""
    calls.append(("read_back", path, threads, model.training, any(p.requires_grad for p in model.parameters())))
    return ReadBack(4, ["a code differs"], lambda x: -model(x), after)


def read_back_broken(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """A runtime that raises."""

    def runtime(x: Tensor) -> Tensor:
        raise RuntimeError("there is no kernel")

    return ReadBack(4, ["a code differs"], runtime)


def after() -> list[str]:
    calls.append("after")
    return ["a kernel differs"]


class Rounded(nn.Module):
    """Adds 1/8 in float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        return self.model(x.float()).double() + 0.125


def rounding(model: nn.Module) -> nn.Module:
    calls.append("rounding")
    return Rounded(copy.deepcopy(model))


def bound(measured: Measured) -> Bound:
    calls.append(measured)
    return Bound("a quarter", 0.25)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setitem(FORMATS._rows, "recorded", RECORDED)
    (tmp_path / "model.recorded").touch()
    yield tmp_path / "model.recorded"
    calls.clear()


def layer(weight: QuantSpec | None = None, activation: QuantSpec | None = None) -> nn.Sequential:
    """A layer that returns 1 and 0, 1/4 and 1, and 5/4 and 1; int4 changes 1/4 to 2/7."""
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.25], [0.0, 1.0]]))
    model = nn.Sequential(linear)
    if weight is not None:
        prepare_qat(model, weight, activation)
        calibrate(model, [X])
    return model


def test_a_format_gets_the_trained_model_and_what_was_measured_and_all_failures_are_listed(path: Path) -> None:
    model = layer(QuantSpec(4), QuantSpec(8, symmetric=False, strategy="tensor"))
    result = verify(model, str(path), [(X, LABELS)], threads=3)
    assert all(module.training for module in model.modules())
    assert model[0].weight.requires_grad
    mean = (1 + 2 / 7 + 1 + 9 / 7 + 1) / 6
    measured = Measured(
        quantizes_inputs=True,
        half_precision=False,
        quantization_error=pytest.approx(2 * (2 / 7 - 1 / 4) / 6, rel=1e-4),
        mean_output=pytest.approx(mean),
        rounding_error=pytest.approx(0.125),
    )
    assert calls == ["rounding", ("read_back", path, 3, False, False), "after", measured]
    assert result.failures == [
        "a code differs",
        "a kernel differs",
        "outputs: the mean difference from the trained model is 1.52, but the bound (a quarter) is 0.25 (largest "
        "difference 2.57, over 3 samples)",
    ]
    assert result.summary().startswith("FAILED: a code differs")
    assert (result.passed, result.weights, result.mean_error) == (False, 4, pytest.approx(2 * mean))
    assert (result.trained_metric, result.runtime_metric, result.agreement) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
        0.0,
    )


def test_the_effect_of_rounding_is_measured_only_if_inputs_are_quantized(path: Path) -> None:
    verify(layer(QuantSpec(4)), path, [(X, LABELS)])
    assert [type(call) for call in calls] == [tuple, str, Measured]
    assert (calls[-1].quantizes_inputs, calls[-1].rounding_error) == (False, 0.0)


def test_a_model_without_fake_quantization_is_called_once_per_batch(path: Path) -> None:
    called = []

    def forward(model: Any, batch: Any) -> Any:
        called.append(model)
        return model(batch[0])

    result = verify(layer(), path, [(X[:2], LABELS[:2]), (X[2:], LABELS[2:])], forward=forward)
    assert len(called) == 4
    assert called[:2] == called[2:]
    assert result.quantization_error == 0.0


def test_the_format_may_be_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"no export format writes '\.bin' files"):
        verify(layer(), path.rename(path.with_suffix(".bin")), [(X, LABELS)])
    assert verify(layer(), path.with_suffix(".bin"), [(X, LABELS)], format="recorded").format == "recorded"


def test_both_models_are_scored_by_the_task_or_the_metric(path: Path) -> None:
    values = layer()(X).detach()
    task = verify(layer(), path, [(X, values)], task="regression")
    root = (4 * (1 + 1 / 16 + 1 + 25 / 16 + 1) / 6) ** 0.5
    assert (task.task, task.metric, task.samples, task.agreement) == ("regression", "rmse", 6, pytest.approx(1 / 6))
    assert (task.trained_metric, task.runtime_metric) == (0.0, pytest.approx(root))
    error = torchmetrics.MeanSquaredError()
    metric = verify(layer(), path, [(X, values)], metric=error, class_dim=-1)
    assert (metric.task, metric.metric, metric.samples, metric.agreement) == ("", "MeanSquaredError", 3, 0.0)
    assert (metric.trained_metric, metric.runtime_metric) == (0.0, pytest.approx(root**2))


def read_back_picky(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """A runtime that does not accept its inputs."""

    def runtime(x: Tensor) -> Tensor:
        raise InputError("texts are padded", key="batches", advice="use texts of equal length")

    return ReadBack(4, [], runtime, close=lambda: calls.append("closed"))


def test_a_batch_that_the_runtime_does_not_accept_says_nothing_about_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = replace(RECORDED, read_back=f"{__name__}:read_back_picky")
    monkeypatch.setitem(FORMATS._rows, "recorded", picky)
    with pytest.raises(QatkitError, match="batches: texts are padded; use texts of equal length"):
        verify(layer(), path, [(X, LABELS)])
    assert calls == ["closed"]


def test_a_runtime_that_raises_is_a_failure_after_those_of_the_weights(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(RECORDED, read_back=f"{__name__}:read_back_broken")
    monkeypatch.setitem(FORMATS._rows, "recorded", broken)
    result = verify(layer(), path, [(X, LABELS)])
    assert result.failures == [
        "a code differs",
        "outputs: the runtime fails on batch 1 (expected: Tensor [3, 2]): there is no kernel",
    ]
    assert (result.passed, result.mean_error, result.runtime_metric) == (False, None, None)
