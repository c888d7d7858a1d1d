"""Losses over independent labels and over embeddings, against torch's own formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.distillation.losses import binary_kl_loss, cosine_loss, kd_loss, similarity_loss

ROWS = torch.tensor([True, True, False, True, False, True])
LABELS = torch.where(ROWS, 1, -100)
SELECTIONS: list[dict[str, Tensor]] = [{"mask": ROWS}, {"labels": LABELS}]


def values(seed: int, width: int = 5) -> Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_binary_divergence_is_that_of_bernoulli_distributions(temperature: float) -> None:
    student, teacher = values(0), values(1)
    p, q = (Bernoulli(logits=part.double() / temperature) for part in (teacher, student))
    expected = kl_divergence(p, q).mean() * temperature**2
    torch.testing.assert_close(binary_kl_loss(student, teacher, temperature).double(), expected)


def test_the_default_temperature_is_one() -> None:
    assert binary_kl_loss(values(0), values(1)) == binary_kl_loss(values(0), values(1), 1.0)


def test_the_binary_divergence_is_that_of_two_classes_per_label() -> None:
    student, teacher = (torch.stack([part, torch.zeros_like(part)], dim=-1) for part in (values(0), values(1)))
    torch.testing.assert_close(binary_kl_loss(values(0), values(1), 2.0), kd_loss(student, teacher, 2.0))


def test_one_minus_the_cosine_is_that_of_torch() -> None:
    expected = 1 - F.cosine_similarity(values(0).double(), values(1).double()).mean()
    torch.testing.assert_close(cosine_loss(values(0), values(1)).double(), expected)


def test_similarities_of_all_rows_are_compared_whatever_the_widths() -> None:
    student, teacher = values(0), values(1, width=7)
    expected = F.mse_loss(pairwise(student), pairwise(teacher))
    torch.testing.assert_close(similarity_loss(student, teacher).double(), expected)


def pairwise(rows: Tensor) -> Tensor:
    """The cosine similarity of every row to every other, one pair at a time."""
    return torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows.double()]) for a in rows.double()])


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
@pytest.mark.parametrize("selection", SELECTIONS, ids=["mask", "labels"])
def test_only_the_selected_rows_count(loss: Any, selection: dict[str, Tensor]) -> None:
    found = loss(values(0), values(1), **selection)
    torch.testing.assert_close(found, loss(values(0)[ROWS], values(1)[ROWS]))


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
def test_without_a_selected_row_the_loss_is_zero_with_a_graph(loss: Any) -> None:
    student = values(0).requires_grad_()
    found = loss(student, values(1), mask=torch.zeros(6, dtype=torch.bool))
    found.backward()
    assert found == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
def test_half_precision_is_computed_in_float32_and_no_gradient_reaches_the_teacher(loss: Any) -> None:
    student, teacher = values(0).bfloat16().requires_grad_(), values(1).bfloat16().requires_grad_()
    found = loss(student, teacher)
    assert torch.equal(found, loss(student.float(), teacher.float()))
    found.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
def test_a_loss_names_itself_where_the_numbers_of_rows_differ(loss: Any) -> None:
    with pytest.raises(QatkitError, match=rf"^{loss.__name__}\b.*\[6, 5\].*\[4, 5\]; pass .* shape"):
        loss(values(0), values(1)[:4])


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
def test_rows_may_have_several_dimensions(loss: Any) -> None:
    torch.testing.assert_close(
        loss(values(0).view(2, 3, 5), values(1).view(2, 3, 5), mask=ROWS.view(2, 3)),
        loss(values(0), values(1), mask=ROWS),
    )


@pytest.mark.parametrize("loss", [binary_kl_loss, cosine_loss, similarity_loss])
def test_nan_in_an_ignored_row_of_either_model_changes_nothing(loss: Any) -> None:
    student, teacher = (part.masked_fill(~ROWS[:, None], torch.nan) for part in (values(0), values(1)))
    student.requires_grad_()
    found = loss(student, teacher, mask=ROWS)
    found.backward()
    torch.testing.assert_close(found, loss(values(0), values(1), mask=ROWS))
    assert student.grad is not None
    assert student.grad.isfinite().all()
