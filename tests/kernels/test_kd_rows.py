"""The Triton row kernel, run by Triton's interpreter, against the torch reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.kernels.kd_rows_torch import TorchRows
from tests.distillation.tensors import sines

pytest.importorskip("triton")  # it exists for Linux only
from qatkit.kernels.kd_rows_triton import KINDS, TritonRows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, tests/distillation/test_cuda.py runs the kernel"
)

BETA, ALPHA, ROWS = 0.3, 0.7, 4
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Relative error of the gradient, which is stored in the dtype of the logits: half a step of it."""


def compare(student: Tensor, teacher: Tensor, kind: str, temperature: float, labels: bool = True) -> None:
    rows, classes = student.shape
    label = torch.arange(rows) * 7 % classes if labels else None
    weights, label_weights = torch.arange(1, rows + 1) / 10, torch.arange(rows) / 3
    exact = student.double()
    rows_of = implementation(DIVERGENCES[kind].rows)
    options = (classes, torch.float64, torch.device("cpu"), temperature, ALPHA, rows_of, None, BETA)
    expected = TorchRows(rows, *options)(exact, teacher.double(), label, weights.double(), label_weights.double())
    result = student.clone()
    values = TritonRows(temperature, ALPHA, kind, BETA, True)(result, teacher, label, weights, label_weights)
    for value, true in zip(values, expected, strict=True):
        assert value.item() == pytest.approx(true.item(), rel=1e-5)
    assert (result.double() - exact).norm() <= BOUNDS[student.dtype] * exact.norm()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_and_gradients_equal_those_of_the_torch_reference(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = (sines(seed, ROWS, 301, scale=3).to(dtype) for seed in (1, 2))
    compare(student, teacher, kind, temperature)
    compare(student, teacher, kind, temperature, labels=False)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_classes_of_the_student_count_in_the_cross_entropy_only(kind: str) -> None:
    compare(sines(1, ROWS, 301, scale=3), sines(2, ROWS, 280, scale=3), kind, 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_may_be_longer_than_one_block_and_its_logits_far_from_zero(kind: str) -> None:
    student, teacher = sines(1, 2, 4500, scale=3) + 500, sines(2, 2, 4500, scale=3) - 500
    student[:, 4400] += 50  # the maximum comes late, so that the earlier sum fades
    compare(student.round(decimals=2), teacher.round(decimals=2), kind, 2.0)


def test_without_a_gradient_the_logits_are_kept() -> None:
    student, teacher = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3)
    kept, weights = student.clone(), torch.ones(ROWS)
    TritonRows(1.0, ALPHA, "kl", BETA, False)(student, teacher, None, weights, weights)
    assert torch.equal(student, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_banned_class_changes_nothing_for_the_others(kind: str) -> None:
    student, teacher = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3)
    student[:, 0] = teacher[:, 0] = -1e9
    compare(student, teacher, kind, 2.0, labels=False)


def test_a_label_that_is_not_a_class_gives_a_loss_of_nan() -> None:
    student, teacher, weights = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3), torch.ones(ROWS)
    labels = torch.tensor([0, 301, 2, 3])
    _, cross_entropy = TritonRows(1.0, ALPHA, "kl", BETA, True)(student, teacher, labels, weights, weights)
    assert cross_entropy.isnan()
