"""Intervals of F1, IOU, RMSE and mAP, by a bootstrap over samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import f1_score
from torch import Tensor

from qatkit.tasks.table import TASKS
from qatkit.trials.bootstrap import Bootstrap
from qatkit.trials.promise import Promise, compare

pytestmark = pytest.mark.medium
RANDOM = torch.Generator().manual_seed(0)


def drawn(task: str, outputs: list[Tensor], batches: list[Any], sizes: list[int]) -> tuple[float, float]:
    found = Bootstrap(TASKS[task])
    for index, batch in enumerate(batches):
        found.add([output.split(sizes)[index] for output in outputs], batch)
    interval = found.interval()
    assert interval is not None
    return interval


def test_the_interval_of_f1_is_that_of_scipy() -> None:
    labels = torch.randint(2, (150, 3), generator=RANDOM)
    logits = [labels * 2.0 - 1 + noise * torch.randn(150, 3, generator=RANDOM) for noise in (0.8, 1.2)]
    ours = drawn("multilabel", logits, [(None, part) for part in labels.split(75)], [75, 75])

    def lost(index: np.ndarray[Any, Any]) -> float:
        first, second = (
            f1_score(labels[index], (each[index] > 0).int(), average="macro", zero_division=0) for each in logits
        )
        return float((first - second) / first)

    theirs = bootstrap((np.arange(150),), lost, n_resamples=300, method="percentile", vectorized=False, rng=0)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)
    assert ours[0] < lost(np.arange(150)) < ours[1]


def test_images_and_not_pixels_are_drawn() -> None:
    """Pixels of an image that is wrong as a whole are not independent."""
    labels = torch.randint(2, (20, 8, 8), generator=RANDOM)
    right = torch.stack([1.0 - labels, labels.float()], 1)
    wrong = torch.cat([1 - right[:5], right[5:]])
    low, high = drawn("segmentation", [right, wrong], [(None, labels)], [20])
    assert high - low > 0.3, "five of 20 images vary much more than 320 of 1280 pixels"
    assert drawn("segmentation", [right, right], [(None, labels)], [20]) == (0, 0)


class Boxes:
    """A detector that finds the boxes of some images."""

    def __init__(self, found: int) -> None:
        self.found = found

    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        good = (pixel_values[:, 0] < self.found)[:, None, None]
        box = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(len(pixel_values), 1, 4)
        logits = torch.tensor([9.0, 0.0]).expand(len(pixel_values), 1, 2)
        return {"logits": logits, "pred_boxes": torch.where(good, box, box / 2)}


def images() -> Iterator[dict[str, Any]]:
    truth = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    for start in (0, 10):
        yield {"pixel_values": torch.arange(start, start + 10.0)[:, None], "labels": [truth] * 10, "task": "detection"}


def test_the_promise_of_a_detector_has_an_interval() -> None:
    pytest.importorskip("pycocotools")
    found: Promise = compare(Boxes(20), Boxes(12), images(), TASKS["detection"])
    assert found.interval is not None
    low, high = found.interval
    assert 0 < low < found.lost < high
