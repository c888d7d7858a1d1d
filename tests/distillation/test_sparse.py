"""The loss from a teacher's top-k classes against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatkit import QatkitError
from qatkit.distillation.losses import kd_loss
from qatkit.distillation.sparse import sparse_kd_loss, top_k_kd_loss, top_k_log_probabilities
from tests.distillation.tensors import LABELS, VOCABULARY, logits


def closed_form(student: Tensor, teacher: Tensor, k: int, temperature: float, tail: bool) -> Tensor:
    """Each position in float64: both distributions over the teacher's top-k classes and all others as one."""
    p, q = ((part.double() / temperature).softmax(-1) for part in (teacher, student))
    best = p.argsort(dim=-1, descending=True)[..., :k]
    p, q = p.gather(-1, best), q.gather(-1, best)
    if tail:
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], dim=-1) for part in (p, q))
    else:
        p, q = (part / part.sum(-1, keepdim=True) for part in (p, q))
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("k", "temperature"), [(1, 2.0), (8, 1.0), (8, 3.0), (VOCABULARY - 1, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formula_in_float64(k: int, temperature: float, tail: bool) -> None:
    student, teacher, counted = logits(1).requires_grad_(), logits(2), LABELS != -100
    exact = logits(1).double().requires_grad_()
    loss = top_k_kd_loss(student, teacher, k, temperature, labels=LABELS, tail=tail)
    expected = closed_form(exact, teacher, k, temperature, tail)[counted].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12)
    loss.backward()
    expected.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_with_all_classes_but_one_and_the_tail_it_is_the_whole_divergence_and_with_fewer_less() -> None:
    student, teacher = logits(1), logits(2)
    whole = kd_loss(student, teacher, 2.0)
    torch.testing.assert_close(top_k_kd_loss(student, teacher, VOCABULARY - 1, 2.0), whole)
    found = [top_k_kd_loss(student, teacher, k, 2.0).item() for k in (1, 4, 16)]
    assert 0 < found[0] < found[1] < found[2] < whole.item()


def test_a_tail_too_small_for_one_minus_the_rest_is_kept() -> None:
    teacher = torch.tensor([[40.0, 0.0, 0.0]])
    _, _, log_tail = top_k_log_probabilities(teacher, 1)
    assert log_tail.item() == pytest.approx(torch.tensor(2.0).log().item() - 40.0, rel=1e-6)
    student = torch.tensor([[50.0, 0.0, 0.0]], requires_grad=True)
    top_k_kd_loss(student, teacher, 1).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_classes_masked_with_minus_infinity_in_both_add_nothing() -> None:
    masked = [
        torch.cat([part, torch.full((*part.shape[:-1], 2), -torch.inf)], dim=-1) for part in (logits(1), logits(2))
    ]
    for k in (8, VOCABULARY + 1):
        student = masked[0].clone().requires_grad_()
        loss = top_k_kd_loss(student, masked[1], k)
        loss.backward()
        torch.testing.assert_close(loss, top_k_kd_loss(logits(1), logits(2), min(k, VOCABULARY - 1)))
        assert student.grad is not None
        assert student.grad[..., :VOCABULARY].isfinite().all()


def test_probabilities_rounded_to_half_precision_give_no_loss_between_equal_models() -> None:
    indices, log_p, log_tail = top_k_log_probabilities(logits(1), 8)
    loss = sparse_kd_loss(logits(1), indices.int(), log_p.half(), log_tail.half())
    assert 0 <= loss.item() < 1e-6


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(QatkitError, match=f"k: {k} is out of range for .*; use an integer from 1 to {VOCABULARY - 1}"):
        top_k_kd_loss(logits(1), logits(2), k)


def test_shapes_that_do_not_fit_are_named() -> None:
    indices, log_p, _ = top_k_log_probabilities(logits(1), 8)
    with pytest.raises(QatkitError, match=r"\[2, 5, 37\], the teacher's indices \[3, 5, 8\]"):
        sparse_kd_loss(logits(1)[:2], indices, log_p)
