"""Feature losses against their formulas in float64, written out without tensors of heads and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit import QatkitError
from qatkit.distillation.features import (
    Projections,
    attention_transfer_loss,
    hidden_cosine_loss,
    hidden_mse_loss,
    layer_map,
    pair_layers,
    relation_loss,
)
from tests.distillation.tensors import sines

MASK = torch.tensor([[True, True, True, False, False], [True] * 5])


def relation_by_hand(student: Tensor, teacher: Tensor, heads: int, lengths: list[int]) -> float:
    """Sentence by sentence without its padding, head by head."""
    values = []
    for row, length in enumerate(lengths):
        total = torch.zeros(length, dtype=torch.float64)
        for head in range(heads):
            p, q = (
                torch.softmax(part @ part.T / part.shape[1] ** 0.5, dim=-1)
                for part in (
                    vectors[row, :length].double().chunk(heads, dim=-1)[head] for vectors in (teacher, student)
                )
            )
            total += (p * (p / q).log()).sum(-1) / heads
        values.append(total)
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_those_of_the_sentences_without_padding(heads: int) -> None:
    student, teacher = sines(1, 2, 5, 8, scale=2), sines(2, 2, 5, 12, scale=2)
    expected = relation_by_hand(student, teacher, heads, [3, 5])
    assert relation_loss(student, teacher, heads, MASK).item() == pytest.approx(expected, rel=1e-5)
    expected = relation_by_hand(student, teacher, heads, [5, 5])
    assert relation_loss(student, teacher, heads).item() == pytest.approx(expected, rel=1e-5)


def test_relations_do_not_see_a_rotation_of_every_head() -> None:
    # why MiniLM needs no projection: only angles and lengths within a head count
    student = sines(1, 2, 5, 8)
    rotation, _ = torch.linalg.qr(sines(3, 4, 4).double())
    rotated = (student.double().unflatten(-1, (2, 4)) @ rotation).flatten(-2).float()
    assert relation_loss(student, rotated, heads=2).item() == pytest.approx(0, abs=1e-6)
    assert relation_loss(student, rotated, heads=4).item() > 1e-3


def test_a_sentence_of_padding_alone_gives_a_gradient_without_nan() -> None:
    student = sines(1, 2, 5, 8).requires_grad_()
    relation_loss(student, sines(2, 2, 5, 8), 2, torch.tensor([[False] * 5, [True] * 5])).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[0].any()


def test_hidden_states_are_compared_over_the_positions_that_count() -> None:
    student, teacher = sines(1, 2, 5, 8), sines(2, 2, 5, 8)
    pairs = student[MASK].double(), teacher[MASK].double()
    assert hidden_mse_loss(student, teacher, MASK).item() == pytest.approx(F.mse_loss(*pairs).item(), rel=1e-5)
    cosines = (pairs[0] * pairs[1]).sum(-1) / (pairs[0].norm(dim=-1) * pairs[1].norm(dim=-1))
    assert hidden_cosine_loss(student, teacher, MASK).item() == pytest.approx(1 - cosines.mean().item(), rel=1e-5)


def test_attention_transfer_is_the_formula_for_any_number_of_channels() -> None:
    student, teacher = sines(1, 3, 4, 6, 6), sines(2, 3, 9, 6, 6)
    distances = []
    for ours, theirs in zip(student.double(), teacher.double(), strict=True):
        maps = [features.pow(2).sum(0).flatten() for features in (ours, theirs)]
        distances.append((maps[0] / maps[0].norm() - maps[1] / maps[1].norm()).norm())
    expected = torch.stack(distances).mean().item()
    assert attention_transfer_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss_and_a_finite_gradient() -> None:
    student = sines(1, 2, 5, 8).requires_grad_()
    teacher = student.detach().clone()
    for loss in (
        hidden_mse_loss(student, teacher),
        hidden_cosine_loss(student, teacher),
        attention_transfer_loss(student, teacher),
        relation_loss(student, teacher, 2),
    ):
        assert loss.item() == pytest.approx(0, abs=1e-6)
        loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_projections_learn_the_map_between_two_widths() -> None:
    student, teacher = torch.randn(64, 4), torch.randn(64, 6)
    projections = Projections(1, 4, 6)
    optimizer = torch.optim.LBFGS(projections.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = hidden_mse_loss(projections([student])[0], teacher)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    best = torch.linalg.lstsq(student.double(), teacher.double()).solution
    expected = F.mse_loss(student.double() @ best, teacher.double()).item()
    assert hidden_mse_loss(projections([student])[0], teacher).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "layers", "expected"),
    [
        ((6, 12), "uniform", [1, 3, 5, 7, 9, 11]),
        ((5, 12), "uniform", [1, 3, 6, 8, 11]),
        ((4, 12), "last", [8, 9, 10, 11]),
        ((3, 3), "uniform", [0, 1, 2]),
        ((2, 12), [0, 5], [0, 5]),
    ],
)
def test_layers_are_mapped(sizes: tuple[int, int], layers: str | list[int], expected: list[int]) -> None:
    assert layer_map(*sizes, layers) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "layers", "message"),
    [
        ((13, 12), "uniform", "13 student layers cannot be mapped to 12 teacher layers; .* from 1 to 12"),
        ((2, 12), "first", "unknown layer map 'first'; use 'uniform', 'last'"),
        ((2, 12), [1], r"\[1\] does not contain one teacher layer index .* use 2 indices from 0 to 11"),
        ((2, 12), [1, 12], r"\[1, 12\] does not contain one teacher layer index"),
    ],
)
def test_a_wrong_map_is_refused_with_advice(sizes: tuple[int, int], layers: object, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        layer_map(*sizes, layers)  # type: ignore[arg-type]


LAYERS = [name for number in range(4) for name in (f"layers.{number}", f"layers.{number}.mlp")]


@pytest.mark.parametrize(
    ("layers", "layers_by", "expected"),
    [
        ({"layers.*": "layers.*"}, "uniform", {"layers.0": "layers.1", "layers.1": "layers.3"}),
        ({"layers.*": "layers.*"}, "last", {"layers.0": "layers.2", "layers.1": "layers.3"}),
        (
            {"layers.*.mlp": "layers.[02].mlp"},
            "uniform",
            {"layers.0.mlp": "layers.0.mlp", "layers.1.mlp": "layers.2.mlp"},
        ),
        ({"layers.1": "layers.0"}, "uniform", {"layers.1": "layers.0"}),
        (
            {"layers.*": "layers.[23]", "layers.1": "layers.0"},
            "uniform",
            {"layers.0": "layers.2", "layers.1": "layers.0"},
        ),
    ],
)
def test_layers_are_paired_by_names_and_globs(layers: dict[str, str], layers_by: Any, expected: dict[str, str]) -> None:
    assert pair_layers(layers, ["", "layers", *LAYERS[:4]], ["", "layers", *LAYERS], layers_by) == expected


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(QatkitError, match=r"\[2, 5, 8\], the teacher's \[2, 5, 12\]; map states .* with Projections"):
        hidden_cosine_loss(sines(1, 2, 5, 8), sines(2, 2, 5, 12))
    with pytest.raises(
        QatkitError, match=r"\[2, 4, 6, 6\], the teacher's \[2, 4, 3, 3\]; .* equal shape except for the channels"
    ):
        attention_transfer_loss(sines(1, 2, 4, 6, 6), sines(2, 2, 4, 3, 3))
    with pytest.raises(QatkitError, match=r"heads=5 must divide both widths"):
        relation_loss(sines(1, 2, 5, 8), sines(2, 2, 5, 8), 5)
