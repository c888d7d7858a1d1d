"""`verify` with a function that calls the model and a metric of torchmetrics, for outputs of any kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.export.dense import export_dense
from qatkit.export.onnx.format import export_onnx
from qatkit.export.verification import Verification, verify
from tests.tasks import sets

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
CLASSES, VALUES = torch.arange(16) % 4, X[:, :4].contiguous()
IMAGES = [torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Detector(nn.Module):
    """Takes a list of images, and returns for each the boxes whose score is high enough: any number of them."""

    def __init__(self, least: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.least, self.body = least, nn.Conv2d(1, 8, 3, padding=1)
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            hidden = self.body(image[None]).relu()
            boxes, scores = (head(hidden)[0].flatten(1).T for head in (self.boxes, self.classes))
            kept = scores.amax(1) > self.least
            found.append({"boxes": boxes[kept], "scores": scores[kept].amax(1), "labels": scores[kept].argmax(1)})
        return found


class BestScore(torchmetrics.Metric):
    """Takes the lists of dicts that detection metrics take."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("best", torch.tensor(0.0), "max")

    def update(self, found: list[dict[str, Tensor]], labels: list[dict[str, Tensor]]) -> None:
        assert len(found) == len(labels)
        self.best = torch.stack([self.best, *(one["scores"].max() for one in found)]).max()

    def compute(self) -> Any:
        return self.best


class TwiceTheBoxes(BestScore):
    """Looks its output up by name and position."""

    def update(self, found: Any, labels: Tensor) -> None:
        self.best += found["heads"][1]["twice"].abs().sum()


class Precision(BestScore):
    """Computes several numbers, as mean average precision does."""

    def compute(self) -> Any:
        return {"map": self.best, "map_50": self.best}


@dataclass
class Answer:
    logits: Tensor
    extra: Tensor


class Net(nn.Module):
    """Returns its two outputs in one of several ways."""

    def __init__(self, kind: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.extra = kind, nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        outputs = {"logits": self.body(x), "extra": self.extra(x)}
        if self.kind is Answer:
            return Answer(**outputs)
        return tuple(outputs.values()) if self.kind is tuple else outputs if self.kind is dict else outputs["logits"]


class Sample(NamedTuple):
    x: Tensor
    target: Tensor


def checked(model: nn.Module, batches: Sequence[Any], folder: Path, **options: Any) -> Verification:
    model = copy.deepcopy(model)  # parameters of tests are shared
    prepare_qat(model, QuantSpec(4))
    export_dense(model, folder / "model.safetensors")
    return verify(model, folder / "model.safetensors", batches, **options)


def on_first(model: Any, batch: Any) -> Any:
    return model(batch[0])


def test_a_detector_is_verified_though_its_number_of_boxes_varies(tmp_path: Path) -> None:
    batches = [(IMAGES[:2], [{"boxes": torch.zeros(1, 4)}] * 2), (IMAGES[2:], [{"boxes": torch.zeros(0, 4)}])]
    result = checked(Detector(), batches, tmp_path, forward=on_first, metric=BestScore())
    assert result.passed, result.failures
    assert (result.metric, result.agreement, result.mean_error) == ("BestScore", 1.0, 0.0)
    assert result.trained_metric == result.runtime_metric > 0.2
    assert " values, outputs differ by 0" in result.summary()
    assert result.quantization_error >= 0.0


def test_a_changed_file_of_a_detector_fails_and_the_output_is_named(tmp_path: Path) -> None:
    model = Detector()
    prepare_qat(model, QuantSpec(4))
    export_dense(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        model.classes.bias += 0.1
    result = verify(
        model, tmp_path / "model.safetensors", [(IMAGES, [{}] * 3)], forward=on_first, metric=BestScore()
    )  # fmt: skip
    assert not result.passed
    assert any("'classes.bias': 3 of 3 values differ" in failure for failure in result.failures)
    assert any("the runtime fails on batch 1" in failure and "'0.boxes' [" in failure for failure in result.failures)


ACCURACY = torchmetrics.Accuracy(task="multiclass", num_classes=4)
ERROR = torchmetrics.MeanSquaredError()


@pytest.mark.parametrize(
    ("model", "batch", "options", "count"),
    [
        (Net(), (X, VALUES), {"forward": on_first, "metric": ERROR}, 64),
        (Net(), (X, CLASSES), {"forward": on_first, "metric": ACCURACY, "class_dim": -1}, 16),
        (Net(), {"x": X, "labels": VALUES}, {"forward": lambda model, batch: model(x=batch["x"]), "metric": ERROR}, 64),
        (Net(tuple), (X, VALUES), {"forward": lambda model, batch: model(batch[0])[0], "metric": ERROR}, 64),
        (Net(), Sample(X, VALUES), {"forward": lambda model, batch: model(batch.x), "metric": ERROR}, 64),
        (Net(dict), (X, CLASSES), {"forward": on_first, "task": "classification"}, 16),
        (Net(Answer), (X, CLASSES), {"forward": on_first, "task": "classification"}, 16),
        (
            sets.bert("ForTokenClassification"), {"input_ids": CLASSES.view(2, 8), "labels": CLASSES.view(2, 8) % 2},
            {"forward": lambda model, batch: model(**batch), "task": "token_classification"}, 16,
        ),
    ],
    ids=["values", "classes", "mapping", "one of several", "named tuple", "dict", "dataclass", "transformers"],
)  # fmt: skip
def test_a_model_is_called_in_its_own_way(
    model: nn.Module, batch: Any, options: dict[str, Any], count: int, tmp_path: Path
) -> None:
    result = checked(model, [batch], tmp_path, **options)
    assert result.passed, result.failures
    assert (result.samples, result.agreement, result.mean_error) == (count, 1.0, 0.0)
    assert result.trained_metric == result.runtime_metric


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        (Net(), {"x": X}, {"forward": lambda m, b: m(b["x"])}, r"batches: a batch \(keys \['x'\]\) contains no labels"),
        (Net(), [X], {}, r"batches: a batch \(list with '0' \[16, 8\]\) contains no labels for the metric"),
        (Net(tuple), (X, VALUES), {}, r"metric: MeanSquaredError does not accept .*tuple with '0' \[16, 4\], '1' "),
        (Net(), (X, VALUES), {"class_dim": 2}, r"class_dim: an output of shape \[16, 4\] has no dimension 2; pass"),
        (Net(), (X, VALUES), {"forward": lambda m, b: None}, r"forward: the model returned NoneType, which contains"),
        (Detector(), (IMAGES, [{}] * 3), {"metric": Precision()}, r"metric: Precision returns dict with 'map'"),
        (
            Detector(99.0), (IMAGES, torch.zeros(0)), {"forward": lambda m, b: m(b[0])[0]["scores"]},
            r"batches: no prediction can be scored: the model returns none, or every label is ignored",
        ),
    ],
    ids=["no labels", "no pair", "wrong outputs", "no dimension", "no tensor", "several numbers", "no prediction"],
)  # fmt: skip
def test_what_cannot_be_scored_is_an_error_that_names_it(
    model: nn.Module, batch: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QatkitError, match=f"^{message}"):
        checked(model, [batch], tmp_path, **{"forward": on_first, "metric": ERROR} | options)


class Scales(nn.Module):
    """Returns nested outputs from one tensor, in an order that is not the alphabet's."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"scores": self.scores(x), "heads": (self.boxes(x), {"twice": 2 * self.boxes(x)})}


def test_an_onnx_file_returns_the_outputs_as_the_model_names_them(tmp_path: Path) -> None:
    model = Scales()
    prepare_qat(model, QuantSpec(4))
    export_onnx(model, X, tmp_path / "model.onnx")
    result = verify(model, tmp_path / "model.onnx", [(X, VALUES)], forward=on_first, metric=TwiceTheBoxes())
    assert result.passed, result.failures
    assert result.samples == 16 * (3 + 4 + 4)
    assert result.trained_metric == pytest.approx(result.runtime_metric)
    with pytest.raises(
        QatkitError, match=r"exports only models whose inputs are tensors, but this example is list with '0' \["
    ):
        export_onnx(Detector(), IMAGES, tmp_path / "model.onnx")


def test_no_batch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match="there are no batches"):
        checked(Net(), [], tmp_path)
