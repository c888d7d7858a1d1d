"""Second moments of inputs, of linear layers and of convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QuantSpec, prepare_qat
from qatkit.quantization.prepare import qat_layers
from qatkit.quantization.ptq.hessian import InputStatistics, is_matrix_product, output_error, record_inputs


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 5), torch.randn(3, 7, 6)),
        (nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 6)),
        (nn.Conv2d(3, 5, (3, 2), stride=2, padding=(2, 0), dilation=(1, 2)), torch.randn(20, 3, 9, 9)),
        (nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), torch.randn(2, 3, 6, 6)),
        (nn.Conv1d(3, 5, 4, stride=3, padding=1), torch.randn(2, 3, 11)),
    ],
)
def test_the_error_of_the_output_follows_from_the_hessian(layer: Any, x: torch.Tensor) -> None:
    model = nn.Sequential(layer)
    exact = model(x).detach()
    prepare_qat(model, weight=QuantSpec(2, observer="mse"))
    statistics = InputStatistics(second_moment=True)
    record_inputs(qat_layers(model)[0][1], x, statistics)
    with torch.no_grad():
        outputs = (model(x) - exact).double().movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        error = (layer.fake_quantized_weight() - layer.weight).flatten(1)
    assert statistics.rows == len(outputs)
    torch.testing.assert_close(
        output_error(error, statistics.hessian).double(), outputs.square().mean(0), rtol=1e-4, atol=0
    )


def test_statistics_add_up_over_batches_and_can_be_rescaled() -> None:
    x, scales = torch.randn(50, 4), torch.tensor([1.0, 2.0, 0.5, 10.0])
    parts, divided = InputStatistics(True), InputStatistics(True)
    for part in (x[:20], x[:0], x[20:]):
        parts.update(part)
    divided.update(x / scales)
    assert torch.equal(parts.absmax, x.abs().amax(0))
    torch.testing.assert_close(parts.magnitude, x.abs().mean(0))
    parts.rescale(scales)
    for name in ("absmax", "magnitude", "hessian"):
        torch.testing.assert_close(getattr(parts, name), getattr(divided, name))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_noticed_wherever_they_come(bad: float) -> None:
    statistics = InputStatistics(second_moment=False)
    x = torch.randn(4, 3)
    x[2, 1] = bad
    for part in (x, torch.randn(4, 3)):
        statistics.update(part)
    assert not statistics.finite


def test_grouped_convolutions_and_embeddings_do_not_multiply_rows_with_one_matrix() -> None:
    model = nn.ModuleList([nn.Conv2d(4, 4, 3, groups=4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)])
    prepare_qat(model, weight=QuantSpec(8), include=["*", "1"])
    assert [is_matrix_product(layer) for _, layer in qat_layers(model)] == [False, False, True, True]
