"""Judges: which predictions of two models agree, for a metric of torchmetrics and for a task."""

from __future__ import annotations

import pytest
import torch
import torchmetrics

from qatkit import QatkitError
from qatkit.export.judges import MetricJudge, TaskJudge
from qatkit.tasks import TASKS

BATCH = (torch.zeros(2), torch.zeros(2))


def test_values_agree_within_one_percent() -> None:
    judge = MetricJudge(torchmetrics.MeanSquaredError(), None)
    ours = torch.tensor([1.0, 1.0, -100.0, 0.0, 0.0])
    theirs = torch.tensor([1.005, 1.02, -100.5, 5e-7, 1e-4])
    assert judge.agreements(ours, theirs, BATCH) == 3


@pytest.mark.parametrize("class_dim", [0, -2])
def test_with_a_class_dimension_the_largest_entry_is_the_answer(class_dim: int) -> None:
    judge = MetricJudge(torchmetrics.MeanSquaredError(), class_dim)
    ours = torch.tensor([[3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])  # two classes, three samples
    theirs = torch.tensor([[9.0, 5.0, 1.0], [1.0, 2.0, 0.0]])
    assert judge.agreements(ours, theirs, BATCH) == 2


def test_neighboring_classes_are_different_answers_however_many_there_are() -> None:
    judge = MetricJudge(torchmetrics.MeanSquaredError(), -1)
    ours, theirs = torch.eye(200)[[100, 150]], torch.eye(200)[[101, 150]]  # within 1% as numbers
    assert judge.agreements(ours, theirs, BATCH) == 1


@pytest.mark.parametrize("class_dim", [2, -3])
def test_a_class_dimension_outside_the_output_is_an_error(class_dim: int) -> None:
    with pytest.raises(QatkitError, match=f"has no dimension {class_dim}"):
        MetricJudge(torchmetrics.MeanSquaredError(), class_dim).agreements(torch.zeros(2, 3), torch.zeros(2, 3), BATCH)


def test_ignored_labels_are_not_counted_as_agreements() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    batch = (torch.zeros(3), torch.tensor([0, -100, -100]))
    assert TaskJudge(TASKS["classification"]).agreements(logits, logits, batch) == 1


def test_the_declared_task_decides_what_an_answer_is() -> None:
    ours, theirs = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, -3.0]])
    batch = (torch.zeros(1), torch.tensor([[1.0, 0.0]]))
    assert TaskJudge(TASKS["multilabel"]).agreements(ours, theirs, batch) == 2  # the signs are equal
    assert TaskJudge(TASKS["regression"]).agreements(ours, theirs, batch) == 0  # the values are not


def test_the_task_of_a_batch_decides_what_an_answer_is() -> None:
    ours, theirs = torch.tensor([[2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    batch = {"task": "multilabel", "labels": torch.tensor([[1.0, 0.0]])}
    assert TaskJudge(None).agreements(ours, theirs, batch) == 1  # one of two signs; the largest entries differ


def test_the_error_for_an_unsuitable_metric_names_outputs_and_labels() -> None:
    judge = MetricJudge(torchmetrics.MeanSquaredError(), None)
    with pytest.raises(QatkitError, match=r"MeanSquaredError does not accept .*Tensor \[2, 3\].*Tensor \[2\]") as error:
        judge.add(torch.zeros(2, 3), BATCH)
    assert error.value.__cause__ is not None
    assert error.value.advice == "let forward return the outputs that the metric expects"


def test_a_metric_of_several_numbers_is_an_error() -> None:
    judge = MetricJudge(torchmetrics.MeanSquaredError(num_outputs=2), None)
    judge.add(torch.zeros(3, 2), (None, torch.ones(3, 2)))
    with pytest.raises(QatkitError) as caught:
        judge.value()
    assert str(caught.value) == (
        "metric: MeanSquaredError returns Tensor [2], not a single number; use a metric that returns a single number, "
        'such as a subclass whose compute returns super().compute()["map"]'
    )


def test_a_batch_without_labels_is_an_error() -> None:
    with pytest.raises(QatkitError) as caught:
        MetricJudge(torchmetrics.MeanSquaredError(), None).add(torch.zeros(2), {"x": torch.zeros(2)})
    assert str(caught.value) == (
        "batches: a batch (keys ['x']) contains no labels for the metric; pass pairs (inputs, labels), or "
        '{**batch, "labels": ...} for each batch'
    )
