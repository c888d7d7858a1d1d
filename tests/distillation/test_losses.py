"""Losses over logits against the formulas in float64, against torch and against TRL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.distillation.losses import jsd_loss, kd_loss, mse_loss, reverse_kl_loss, zero_uncounted
from tests.distillation import tensors
from tests.distillation.references import REFERENCES


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
    mask.fill_(False)[3, 2] = True
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, mask), kd_loss(student[3, 2], teacher[3, 2], 2.0))
    nothing = kd_loss(student, teacher, 2.0, torch.zeros_like(mask))
    assert nothing.item() == 0
    nothing.backward()


def test_only_values_at_positions_that_do_not_count_become_zero() -> None:
    values = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0], [3.0, 4.0]])
    assert zero_uncounted(values, torch.tensor([False, False, True])).tolist() == [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]
    assert zero_uncounted(values, None) is values


def test_shapes_that_differ_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], the teacher's \[2, 4\]; pass logits of equal shape$"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_classes_masked_with_minus_infinity_in_both_add_nothing() -> None:
    student, teacher = logits(0), logits(1)
    masked = [torch.cat([part, torch.full((6, 5, 2), -torch.inf)], dim=-1) for part in (student, teacher)]
    torch.testing.assert_close(kd_loss(*masked, temperature=2.0), kd_loss(student, teacher, 2.0))


def closed_form(kind: str, student: Tensor, teacher: Tensor, temperature: float, beta: float = 0.3) -> Tensor:
    """Of every position, in float64."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student))
    m = beta * p + (1 - beta) * q
    parts = {
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }
    return temperature**2 * parts[kind].sum(-1)


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Tensor | None) -> Tensor:
    return jsd_loss(student, teacher, temperature, beta=0.3, **options)


LOSSES: dict[str, Callable[..., Tensor]] = {"kl": kd_loss, "reverse_kl": reverse_kl_loss, "jsd": jsd}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_divergence_and_its_gradient_are_those_of_the_formula_in_float64(kind: str, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    exact = logits(0).double().requires_grad_()
    loss, expected = LOSSES[kind](student, teacher, temperature), closed_form(kind, exact, teacher, temperature).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergences_are_those_that_trl_trains_with(beta: float, temperature: float) -> None:
    student, teacher, labels = tensors.logits(1), tensors.logits(2), tensors.LABELS
    if beta == 0:
        loss = kd_loss(student, teacher, temperature, labels=labels)
    elif beta == 1:
        loss = reverse_kl_loss(student, teacher, temperature, labels=labels)
    else:
        loss = jsd_loss(student, teacher, temperature, labels=labels, beta=beta)
    expected = REFERENCES[f"trl beta={beta} T={temperature}"] * temperature**2  # TRL leaves the factor out
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_labels_of_minus_100_and_the_mask_leave_positions_out_together(kind: str) -> None:
    student, teacher = logits(0), logits(1)
    labels, mask = torch.zeros(6, 5, dtype=torch.long), torch.ones(6, 5, dtype=torch.bool)
    labels[0, 1:], mask[2:, 0] = -100, False
    expected = closed_form(kind, student, teacher, 2.0)[(labels != -100) & mask].mean()
    found = LOSSES[kind](student, teacher, 2.0, mask=mask, labels=labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_half_precision_logits_are_computed_in_float32() -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, mse_loss):
        assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_the_jensen_shannon_divergence_tends_to_both_kullback_leibler_divergences() -> None:
    student, teacher = logits(0) / 4, logits(1) / 4
    near_0, near_1 = (jsd_loss(student, teacher, beta=beta) for beta in (1e-3, 1 - 1e-3))
    assert near_0.item() / 1e-3 == pytest.approx(kd_loss(student, teacher).item(), rel=1e-2)
    assert near_1.item() / 1e-3 == pytest.approx(reverse_kl_loss(student, teacher).item(), rel=1e-2)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_beta_out_of_range_is_refused_and_its_limits_are_named(beta: float) -> None:
    with pytest.raises(QatkitError) as caught:
        jsd_loss(logits(0), logits(1), beta=beta)
    assert str(caught.value) == (
        f"beta: {beta} is out of range; use a number between 0 and 1, or the loss 'kl' for 0 and 'reverse_kl' for 1"
    )


def test_the_squared_difference_is_that_of_torch() -> None:
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(mse_loss(student, teacher), F.mse_loss(student, teacher))
    mask = torch.rand(6, 5) > 0.5
    torch.testing.assert_close(mse_loss(student, teacher, mask), F.mse_loss(student[mask], teacher[mask]))


def test_labels_of_minus_100_leave_positions_out_of_the_squared_difference() -> None:
    student, teacher = logits(0), logits(1)
    labels = torch.zeros(6, 5, dtype=torch.long)
    labels[:, 2:] = -100
    found = mse_loss(student, teacher, labels=labels)
    torch.testing.assert_close(found, F.mse_loss(student[:, :2], teacher[:, :2]))


@pytest.mark.parametrize("loss", [kd_loss, reverse_kl_loss, jsd_loss, mse_loss])
def test_a_loss_names_itself_where_shapes_differ(loss: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{loss.__name__}: the student's logits"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = logits(1).requires_grad_()
    for loss in (kd_loss, reverse_kl_loss, jsd_loss, mse_loss):
        loss(logits(0).requires_grad_(), teacher).backward()
    assert teacher.grad is None
