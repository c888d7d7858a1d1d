"""Hinton's loss against torch and against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qatkit.distillation.losses import kd_loss


def logits(seed: int) -> torch.Tensor:
    return torch.randn(6, 5, 11, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_the_loss_is_the_formula_in_float64(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_torch_kl_div_over_flattened_positions() -> None:
    student, teacher = logits(0), logits(1)
    expected = F.kl_div(student.flatten(0, 1).log_softmax(-1), teacher.flatten(0, 1).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(kd_loss(student, teacher), expected)


def test_the_gradient_keeps_its_size_at_high_temperature() -> None:
    # Hinton's reason for T**2: in the limit the gradient is (student - teacher) / classes, for centred logits
    student = (logits(0) - logits(0).mean(-1, keepdim=True)).requires_grad_()
    teacher = logits(1) - logits(1).mean(-1, keepdim=True)
    kd_loss(student, teacher, temperature=1000.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 11 / 30, rtol=2e-2, atol=1e-4)


def test_masked_positions_do_not_count_and_an_empty_mask_gives_a_zero_with_a_graph() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    mask = torch.rand(6, 5) > 0.5
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, mask), kd_loss(student[mask], teacher[mask], 2.0))
    nothing = kd_loss(student, teacher, 2.0, torch.zeros(6, 5, dtype=torch.bool))
    assert nothing.item() == 0
    nothing.backward()


def test_shapes_that_differ_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], the teacher's \[2, 4\]"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_classes_masked_with_minus_infinity_in_both_add_nothing() -> None:
    student, teacher = logits(0), logits(1)
    masked = [torch.cat([part, torch.full((6, 5, 2), -torch.inf)], dim=-1) for part in (student, teacher)]
    torch.testing.assert_close(kd_loss(*masked, temperature=2.0), kd_loss(student, teacher, 2.0))
