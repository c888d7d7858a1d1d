"""Calibration: the range that was seen, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, calibrate, prepare_qat
from qatkit.quantization.ranges import static_qparams

A8 = QuantSpec(symmetric=False, strategy="tensor")


def prepared() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 2))
    prepare_qat(model, activation=A8)
    return model


def test_the_scale_is_the_range_over_all_batches_and_a_relu_output_has_zero_point_zero() -> None:
    model, batches = prepared(), [torch.randn(16, 4) for _ in range(3)]
    assert calibrate(model, batches) == ["0.input_fake_quant", "4.input_fake_quant"]
    seen = torch.cat(batches)
    first, last = model[0].input_fake_quant, model[4].input_fake_quant
    assert first.scale.item() == ((seen.max() - seen.min()) / 255).item()
    assert first.zero_point.item() == (-seen.min() / first.scale).round().item()
    assert last.zero_point.item() == 0


def test_modes_statistics_gradients_and_random_numbers_are_as_before() -> None:
    model = prepared()
    model[1].eval()
    model[2].train()
    state = torch.get_rng_state()

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(2):
            yield torch.randn(8, 4)  # a loader that shuffles draws random numbers as well

    calibrate(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model[1].training, model[2].training) == (False, True)
    assert model[1].num_batches_tracked == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_interrupted_calibration_leaves_the_model_as_it_was() -> None:
    model = prepared()

    def breaking() -> Iterator[torch.Tensor]:
        yield torch.randn(8, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, breaking())
    assert model[0].input_fake_quant.observer is None
    assert not model[0].input_fake_quant.ready
    assert model.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: calibration received no batches"),
        ([torch.full((2, 4), torch.nan)], "the input of layer '0' has non-finite values during calibration"),
    ],
)
def test_data_that_cannot_calibrate_is_refused_by_layer(batches: list[torch.Tensor], message: str) -> None:
    model = prepared()
    with pytest.raises(QatkitError, match=message):
        calibrate(model, batches)
    assert model[0].input_fake_quant.scale.isnan().all()


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "kl"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("fraction", [1 / 8, 1.0])
def test_a_value_that_is_not_finite_is_noticed_by_every_range_method(
    observer: str, value: float, fraction: float
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare_qat(model, activation=QuantSpec(symmetric=False, strategy="tensor", observer=observer))
    x = torch.randn(2, 4)
    x.view(-1)[: int(8 * fraction)] = value
    with pytest.raises(QatkitError, match="the input of layer '0' has non-finite values during calibration"):
        calibrate(model, [torch.randn(2, 4), x])
    assert model[0].input_fake_quant.scale.isnan().all()


def test_an_interrupt_while_ranges_are_searched_sets_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    found: list[object] = []

    def slow(*given: Any) -> Any:
        found.append(given)
        if len(found) == 2:
            raise KeyboardInterrupt
        return static_qparams(*given)

    monkeypatch.setattr("qatkit.quantization.calibration.static_qparams", slow)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [torch.randn(8, 4)])
    assert model[0].input_fake_quant.scale.isnan().all()


def test_a_model_that_was_not_prepared_is_refused() -> None:
    with pytest.raises(QatkitError, match="model: the model has no fake-quantized layer; call prepare_qat first"):
        calibrate(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_using_a_static_scale_before_calibration_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call qatkit\.calibrate\(model, batches\) first"):
        prepared()(torch.randn(2, 4))
