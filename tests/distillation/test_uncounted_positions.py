"""Positions that do not count affect neither loss nor gradient, regardless of the values there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qatkit.distillation import chunked_op
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.chunked import Head, TopKTargets, linear_kd_loss, linear_kd_terms
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.distillation.features import hidden_cosine_loss, hidden_mse_loss, relation_loss
from qatkit.distillation.sparse import sparse_kd_loss, top_k_kd_loss, top_k_log_probabilities
from tests.distillation.tensors import sines

BAD = [torch.inf, -torch.inf, torch.nan]
COUNTED = torch.tensor([[True, True, False, True], [True, False, False, True]])
LABELS = torch.where(COUNTED, 1, -100)
FUSED = [name for name, row in DIVERGENCES.items() if row.rows]


def damaged(values: Tensor, bad: float) -> Tensor:
    """The same with a non-finite number at every position that does not count."""
    return torch.where(COUNTED.unsqueeze(-1), values, bad)


def assert_same(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, bad: float) -> None:
    """The loss and its gradient do not depend on what stands at positions that do not count."""
    clean, dirty = student.clone().requires_grad_(), damaged(student, bad).requires_grad_()
    expected, actual = loss(clean, teacher), loss(dirty, damaged(teacher, bad))
    assert expected > 0
    assert torch.equal(actual, expected)
    expected.backward()
    actual.backward()
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(dirty.grad, clean.grad)
    assert not dirty.grad[~COUNTED].any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_divergence_touches_them(name: str, bad: float) -> None:
    row = DIVERGENCES[name]
    assert_same(lambda s, t: row.loss(s, t, COUNTED, temperature=2.0), sines(1, 2, 4, 9), sines(2, 2, 4, 9), bad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("tail", [True, False])
def test_the_top_k_losses_do_not_touch_them(tail: bool, bad: float) -> None:
    student, teacher = sines(1, 2, 4, 9), sines(2, 2, 4, 9)
    assert_same(lambda s, t: top_k_kd_loss(s, t, 3, labels=LABELS, tail=tail), student, teacher, bad)
    indices, log_p, log_tail = top_k_log_probabilities(teacher, 3)

    def from_parts(s: Tensor, t: Tensor) -> Tensor:
        outside = damaged(log_tail.unsqueeze(-1), bad).squeeze(-1) if s.isnan().any() or s.isinf().any() else log_tail
        return sparse_kd_loss(s, indices, t, outside if tail else None, labels=LABELS)

    assert_same(from_parts, student, log_p, bad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loss", [hidden_mse_loss, hidden_cosine_loss, lambda s, t, mask: relation_loss(s, t, 2, mask)])
def test_feature_losses_do_not_touch_them(loss: Callable[..., Tensor], bad: float) -> None:
    assert_same(lambda s, t: loss(s, t, COUNTED), sines(1, 2, 4, 8), sines(2, 2, 4, 8), bad)


def parts(bad: float) -> dict[str, Tensor]:
    """Arguments of the fused loss whose hidden states are non-finite where a position does not count."""
    hidden = {"student_hidden": sines(1, 2, 4, 6), "teacher_hidden": sines(3, 2, 4, 5)}
    weights = {
        "student_weight": sines(2, 9, 6).requires_grad_(), "student_bias": sines(5, 9).requires_grad_(),
        "teacher_weight": sines(4, 9, 5), "teacher_bias": sines(6, 9),
    }  # fmt: skip
    states = {name: damaged(value, bad).flatten(0, 1) for name, value in hidden.items()}
    states["student_hidden"].requires_grad_()
    return states | weights


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_loss_does_not_touch_them(name: str, rows: int, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_op.WORKSPACE, "cpu", rows * 2 * 9 * 4)
    results = []
    for value in (0.0, bad):
        tensors = parts(value)
        loss = linear_kd_loss(**tensors, labels=LABELS.flatten(), temperature=2.0, kind=name)
        trained = [part for part in tensors.values() if part.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    for expected, actual in zip(*results, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", FUSED)
def test_a_bias_of_minus_infinity_stays_where_it_counts(name: str) -> None:
    """A class banned by the teacher's bias reaches no row that does not count."""
    tensors = parts(torch.nan)
    tensors["teacher_bias"] = tensors["teacher_bias"].clone().index_fill_(0, torch.tensor([4]), -torch.inf)
    nothing = torch.zeros(8, dtype=torch.bool)
    loss = linear_kd_loss(**tensors, labels=LABELS.flatten(), mask=nothing, kind=name)
    loss.backward()
    assert loss == 0
    assert not any(part.grad.any() for part in tensors.values() if part.grad is not None)


@pytest.mark.parametrize("bad", BAD)
def test_the_fused_loss_from_top_k_classes_does_not_touch_them(bad: float) -> None:
    indices, log_p, log_tail = top_k_log_probabilities(sines(2, 2, 4, 9), 3)
    results = []
    for value in (0.0, bad):
        tensors = parts(value)
        targets = TopKTargets(
            indices.flatten(0, 1), damaged(log_p, value).flatten(0, 1), torch.where(COUNTED, log_tail, value).flatten()
        )
        student = Head(tensors["student_hidden"], tensors["student_weight"], tensors["student_bias"])
        terms = linear_kd_terms(student, targets, LABELS.flatten(), COUNTED.flatten(), 1.0, 0.5, "kl", 0.5)
        results.append([terms.loss.detach(), *torch.autograd.grad(terms.loss, student[:2])])
    for expected, actual in zip(*results, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bad", BAD)
def test_a_cache_stores_no_padding_and_so_accepts_any_output_there(bad: float, tmp_path: Path) -> None:
    tokens = torch.arange(8).view(2, 4)
    batch = {"input_ids": tokens, "attention_mask": COUNTED.long()}
    logits, hidden = damaged(sines(2, 2, 4, 9), bad), damaged(sines(3, 2, 4, 5), bad)
    cache_teacher(lambda batch: (logits, {"layer": hidden}), [batch], tmp_path, {}, k=3)
    targets = CachedTeacher(tmp_path, {}).outputs_for((), batch)
    student = sines(1, 2, 4, 9)
    loss = sparse_kd_loss(student, targets.indices, targets.log_p, targets.log_tail, mask=COUNTED)
    assert loss.item() == pytest.approx(top_k_kd_loss(student, logits, 3, mask=COUNTED).item(), rel=1e-3)
    assert targets.hidden["layer"].isfinite().all()


def test_the_masked_mean_of_the_losses_keeps_a_graph_where_nothing_counts() -> None:
    layer = nn.Linear(3, 4)
    for row in DIVERGENCES.values():
        loss = row.loss(layer(torch.full((2, 3), torch.nan)), torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool))
        assert loss == 0
        assert loss.requires_grad
