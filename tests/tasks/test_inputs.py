"""NaN and infinite values in batches are named by batch and tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qatkit import QatkitWarning
from qatkit.tasks import InputCheck, evaluate

GOOD = torch.ones(2, 4)
BAD = torch.tensor([[1.0, 1.0, torch.nan, 1.0], [1.0] * 4])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        ([(GOOD, LABELS)], None),
        ([], None),
        ([(GOOD, LABELS), (BAD, LABELS)], "'inputs' of test batch 2 of 2 contains non-finite values"),
        ([(GOOD / 0, LABELS)], "'inputs' of test batch 1 of 1 contains non-finite values"),
        ([(BAD, LABELS)] * 3, "'inputs' of test batch 1 of 3 (and of 2 more) contains non-finite values"),
        ([(GOOD, BAD)], "'labels' of test batch 1 of 1 contains non-finite values"),
        ([(GOOD, LABELS, BAD)], "'2' of test batch 1 of 1 contains non-finite values"),
        (
            [{"sound": GOOD, "video": BAD, "labels": LABELS}],
            "'video' of test batch 1 of 1 contains non-finite",
        ),
        ([{"input_ids": LABELS, "attention_mask": -GOOD / 0}], None),  # an additive mask
        ([{"input_ids": LABELS, "attention_mask": BAD}], "'attention_mask' of test batch 1 of 1 contains non-finite"),
    ],
)
def test_the_first_bad_batch_and_its_tensor_are_named_and_the_others_counted(batches: Any, found: str | None) -> None:
    check = InputCheck()
    for batch in batches:
        check.add(batch)
    told = check.found("test")
    assert told is None if found is None else told is not None and told.startswith(found)


def test_evaluated_data_with_nan_is_mentioned() -> None:
    model = nn.Linear(4, 2)
    with pytest.warns(
        QatkitWarning, match=r"^data: 'inputs' of test batch 2 of 2 contains non-finite .*; remove the non-finite"
    ):
        evaluate(model, [(GOOD, LABELS), (BAD, LABELS)], split="test")
    evaluate(model, [(GOOD, LABELS)], split="test")  # our warnings are errors
