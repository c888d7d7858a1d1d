"""The loss's GPU kernel, run by Triton's interpreter, against the eager arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatkit.kernels.kd_rows import DIVERGENCES, Block
from tests.distillation.tensors import sines

pytest.importorskip("triton")  # it exists for Linux alone
from qatkit.kernels.kd_rows_triton import RowKernel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU its own tests run the kernel")

BETA, ALPHA, ROWS = 0.3, 0.7, 4
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Of the gradient, which takes the place of logits: half a step of their dtype."""


def compare(student: Tensor, teacher: Tensor, kind: str, temperature: float, labels: bool = True) -> None:
    rows, classes = student.shape
    label = torch.arange(rows) * 7 % classes if labels else None
    share, label_share = torch.arange(1, rows + 1) / 10, torch.arange(rows) / 3
    exact = student.double()
    options = (classes, torch.float64, torch.device("cpu"), temperature, ALPHA, DIVERGENCES[kind], BETA)
    expected = Block(rows, *options)(exact, teacher.double(), label, share.double(), label_share.double())
    found = student.clone()
    values = RowKernel(temperature, ALPHA, kind, BETA, True)(found, teacher, label, share, label_share)
    for value, true in zip(values, expected, strict=True):
        assert value.item() == pytest.approx(true.item(), rel=1e-5)
    assert (found.double() - exact).norm() <= BOUNDS[student.dtype] * exact.norm()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_and_gradients_are_those_of_the_eager_arithmetic(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = (sines(seed, ROWS, 301, scale=3).to(dtype) for seed in (1, 2))
    compare(student, teacher, kind, temperature)
    compare(student, teacher, kind, temperature, labels=False)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_padding_of_the_student_counts_in_the_cross_entropy_alone(kind: str) -> None:
    compare(sines(1, ROWS, 301, scale=3), sines(2, ROWS, 280, scale=3), kind, 2.0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_row_may_be_longer_than_one_turn_and_its_logits_far_from_zero(kind: str) -> None:
    student, teacher = sines(1, 2, 4500, scale=3) + 500, sines(2, 2, 4500, scale=3) - 500
    student[:, 4400] += 50  # the maximum comes late, and what was summed before fades to nothing
    compare(student.round(decimals=2), teacher.round(decimals=2), kind, 2.0)


def test_without_a_gradient_the_logits_stay() -> None:
    student, teacher = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3)
    kept, share = student.clone(), torch.ones(ROWS)
    RowKernel(1.0, ALPHA, "kl", BETA, False)(student, teacher, None, share, share)
    assert torch.equal(student, kept)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_banned_class_changes_nothing_for_the_others(kind: str) -> None:
    student, teacher = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3)
    student[:, 0] = teacher[:, 0] = -1e9
    compare(student, teacher, kind, 2.0, labels=False)


def test_a_label_that_is_no_class_makes_a_loss_of_nan() -> None:
    student, teacher, share = sines(1, ROWS, 301, scale=3), sines(2, ROWS, 301, scale=3), torch.ones(ROWS)
    labels = torch.tensor([0, 301, 2, 3])
    _, cross_entropy = RowKernel(1.0, ALPHA, "kl", BETA, True)(student, teacher, labels, share, share)
    assert cross_entropy.isnan()
