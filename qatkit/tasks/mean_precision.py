"""Mean average precision of boxes, computed by pycocotools.

The metric in torchmetrics needs torchvision, which cannot be imported with some builds of torch.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.tasks.table import Task

SCALE = 1000.0
"""Factor to convert relative sizes to pixels, the unit of COCO."""


class MeanPrecision(Metric):
    """COCO's average precision over IoU thresholds 0.50 to 0.95, averaged over the classes that occur.

    Each query is counted once, with its most probable class other than "no object" and the probability of this class.
    """

    found: list[Tensor]
    truth: list[Tensor]
    images: Tensor
    finite: Tensor
    """1 if all outputs so far are finite, otherwise 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("truth", default=[], dist_reduce_fx="cat")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("finite", default=torch.tensor(1), dist_reduce_fx="min")

    def update(self, rows: Tensor, labels: Tensor) -> None:
        """Add the boxes of a batch; both arguments come from `qatkit.tasks.detection.answers`."""
        self.finite = self.finite * rows.isfinite().all()
        world, rank = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
        ids = (int(self.images) + torch.arange(len(rows), device=rows.device)) * world + rank
        self.images += len(rows)
        scores, classes = rows[..., :-4].softmax(-1)[..., :-1].max(-1)
        columns = [ids[:, None].expand_as(scores), *_corners(rows[..., -4:]), scores, classes]
        self.found.append(torch.stack([column.double() for column in columns], dim=-1).flatten(0, 1))
        columns = [ids[:, None].expand_as(labels[..., 0]), *_corners(labels[..., 1:]), labels[..., 0]]
        boxes = torch.stack([column.double() for column in columns], dim=-1)
        self.truth.append(boxes[labels[..., 0] != IGNORED])

    def compute(self) -> Tensor:
        """Return the mean average precision, 0 to 1; NaN for non-finite outputs, which COCO would count as matches.

        Raises:
            QatkitError: pycocotools is not installed, or no image contains a box.
        """
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError as error:
            raise QatkitError(
                "pycocotools, which computes the mean average precision, is not installed",
                key="data",
                advice="run: pip install 'qatkit[detection]'",
            ) from error
        if not self.finite:
            return torch.tensor(torch.nan)
        found, truth = (torch.cat(part) if isinstance(part, list) else part for part in (self.found, self.truth))
        if not len(truth):
            raise QatkitError(
                "no image has a box, so no metric can be computed", key="data", advice="add boxes to the labels"
            )
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(each)} for each in torch.unique(found[:, 0])],
            "categories": [{"id": int(each)} for each in torch.unique(torch.cat([found[:, -1], truth[:, -1]]))],
            "annotations": [
                {"id": number, "image_id": int(row[0]), "bbox": row[1:5], "area": row[3] * row[4],
                 "category_id": int(row[5]), "iscrowd": 0}
                for number, row in enumerate(truth.tolist(), 1)
            ],
            "info": {},
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()
            measured = COCOeval(coco, coco.loadRes(found.cpu().numpy()), "bbox")
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
        return torch.tensor(float(measured.stats[0]))


def mean_precision(task: Task, rows: Tensor) -> Metric:
    """Return a metric for COCO's mean average precision (mAP)."""
    return MeanPrecision(sync_on_compute=False)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top, width and height of boxes ``[..., 4]``, in COCO's units."""
    x, y, w, h = (SCALE * boxes).unbind(-1)
    return x - w / 2, y - h / 2, w, h
