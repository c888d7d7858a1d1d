"""The comparison of outputs, on models whose differences are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from qatkit import QatkitError
from qatkit.export.judges import MetricJudge
from qatkit.export.outputs import Output, Outputs, compare_outputs

FIRST, SECOND = (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)), (torch.tensor([[-3.0]]), torch.zeros(1, 1))


class Plus(nn.Module):
    """Adds a number to positive inputs, and another one to the others."""

    def __init__(self, positive: float, negative: float) -> None:
        super().__init__()
        self.positive, self.negative = positive, negative

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x + self.positive, x + self.negative)


def compared(
    runtime: Callable[..., Any] | None,
    batches: list[Any],
    precise: nn.Module | None = None,
    trained: nn.Module | None = None,
    floating: nn.Module | None = None,
) -> tuple[Outputs, list[str]]:
    failures: list[str] = []
    judges = MetricJudge(torchmetrics.MeanSquaredError(), None), MetricJudge(torchmetrics.MeanSquaredError(), None)
    found = compare_outputs(
        trained or Plus(0, 0), floating, runtime, batches, failures, judges, lambda m, batch: m(batch[0]), precise
    )
    return found, failures


@pytest.mark.parametrize("batches", [[FIRST, SECOND], [SECOND, FIRST]])
def test_every_measure_is_over_all_values_of_all_batches(batches: list[Any]) -> None:
    found, failures = compared(Plus(0, 0.5), batches, precise=Plus(0.125, 0.25), floating=Plus(0.5, 1.0))
    assert failures == []
    assert found.each == {
        "": Output(
            values=3, magnitude=6.0, measured=3, quantization=2.0, rounding=0.5, error=0.5, largest=0.5, whole=False
        )
    }
    assert (found.quantization_error, found.mean_error, found.max_error) == (2 / 3, 0.5 / 3, 0.5)
    assert (found.samples, found.counted, found.task, found.metric) == (3, "values", "", "MeanSquaredError")
    assert (found.ran, found.agreement, found.not_in_float64) == (True, 2 / 3, "")
    assert found.trained_metric == pytest.approx(14 / 3)
    assert found.runtime_metric == pytest.approx(11.25 / 3)


def test_without_fake_quantization_there_is_no_quantization_error() -> None:
    found, _ = compared(Plus(0, 0), [FIRST])
    assert (found.each[""].measured, found.quantization_error) == (0, 0.0)


def test_a_runtime_that_fails_is_named_and_not_called_again_and_the_trained_model_is_still_measured() -> None:
    calls = 0

    def runtime(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")
        return x + 1

    found, failures = compared(runtime, [FIRST, SECOND, FIRST, FIRST])
    assert calls == 2
    assert failures == ["outputs: the runtime fails on batch 2 (expected: Tensor [1, 1]): out of memory"]
    assert (found.ran, found.mean_error, found.max_error) == (False, None, None)
    assert (found.agreement, found.runtime_metric) == (None, None)
    assert (found.samples, found.trained_metric) == (7, pytest.approx(24 / 7))


def test_outputs_of_another_shape_are_a_failure() -> None:
    _, failures = compared(lambda x: x[0], [FIRST])
    assert failures == ["outputs: the runtime fails on batch 1 (expected: Tensor [1, 2]): shape [2] instead of [1, 2]"]


def test_a_file_that_cannot_be_loaded_is_not_run() -> None:
    found, failures = compared(None, [FIRST])
    assert (found.ran, found.samples, failures) == (False, 2, [])


class InFloat64(nn.Module):
    """Differs by less than float32 can represent; keeps integers."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        assert inputs["index"].dtype == torch.int64
        small = 2.0**-40 if inputs["x"].dtype == torch.float64 else 0.0
        return inputs["x"][inputs["index"]] + small


def test_the_effect_of_rounding_is_measured_in_float64_on_the_same_integers() -> None:
    inputs = {"x": torch.tensor([1.0, 2.0]), "index": torch.tensor([1, 1, 0])}
    found, _ = compared(None, [(inputs, torch.zeros(3))], precise=InFloat64(), trained=InFloat64())
    assert found.each[""].rounding == 3 * 2.0**-40


class FailsOnNegative(Plus):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if (x < 0).any():
            raise TypeError("float32 only")
        return super().forward(x)


def test_if_float64_fails_on_one_batch_the_effect_of_rounding_is_unknown() -> None:
    precise = FailsOnNegative(0.5, 0.5)
    found, failures = compared(Plus(0, 0), [FIRST, SECOND, FIRST], precise=precise)
    assert failures == []
    assert precise.calls == 2
    assert (found.each[""].rounding, found.not_in_float64) == (0.0, "TypeError: float32 only")


@pytest.mark.parametrize(
    ("trained", "batches", "message"),
    [
        (None, [], "batches: there are no batches to compare outputs for; pass at least one batch"),
        (
            lambda x: ["no tensor"],
            [FIRST],
            "forward: the model returned list, which contains no tensor; return a tensor, or tensors in dicts, lists, "
            "tuples or dataclasses",
        ),
        (
            lambda x: x[:, :0],
            [(FIRST[0], torch.zeros(1, 0))],
            "batches: no prediction can be scored: the model returns none, or every label is ignored; pass batches "
            "with predictions and labels",
        ),
    ],
    ids=["no batch", "no tensor", "no prediction"],
)
def test_nothing_to_compare_is_an_error(trained: Any, batches: list[Any], message: str) -> None:
    with pytest.raises(QatkitError) as caught:
        compared(None, batches, trained=trained)
    assert str(caught.value) == message


def test_each_integer_differs_by_one_or_not_at_all() -> None:
    output = Output()
    output.add(torch.tensor([3, 70, -1]), torch.tensor([3, 90, -1]))
    output.add(torch.tensor([5]), torch.tensor([6]))
    assert output == Output(values=4, whole=True, magnitude=4.0, measured=4, quantization=2.0)


def test_non_finite_values_have_no_magnitude_and_no_quantization_error() -> None:
    output = Output()
    output.add(torch.tensor([torch.inf, 2.0, torch.nan]), torch.tensor([1.0, 2.5, 3.0]))
    assert output == Output(values=3, magnitude=2.0, measured=3, quantization=0.5)


def test_outputs_of_another_shape_without_fake_quantization_are_not_compared() -> None:
    output = Output()
    output.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0]))
    output.add(torch.tensor([1.0, 2.0]), None)
    assert output == Output(values=4, magnitude=6.0)


def test_sums_of_half_precision_outputs_do_not_overflow() -> None:
    output = Output()
    output.add(torch.full((2,), 60000.0, dtype=torch.float16), None)
    assert output.magnitude == 120000.0


def outputs(**each: Output) -> Outputs:
    return Outputs(samples=1, counted="values", task="", metric="", trained_metric=0.0, each=each, ran=True)


def test_a_mean_error_is_over_the_values_of_all_outputs() -> None:
    two = outputs(large=Output(values=1, error=3.0, largest=3.0), small=Output(values=2, error=1.0, largest=0.75))
    assert (two.mean_error, two.max_error) == (4 / 3, 3.0)
    assert outputs(one=Output(values=1, measured=1, error=3.0, quantization=0.5)).mean_error == 3.0
    assert outputs(one=Output(values=4, measured=1, error=3.0, quantization=0.5)).quantization_error == 0.5
    assert outputs(empty=Output()).mean_error == 0.0
