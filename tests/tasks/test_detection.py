"""Detection: the mean average precision, batches that are refused, and models whose outputs mean something else."""

from __future__ import annotations

import json
import math
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from qatkit import QatkitError
from qatkit.common import packages
from qatkit.data import Source, image_detection
from qatkit.data.pictures import ImageFormat
from qatkit.models import untrained_model
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe import Recipe
from qatkit.recipe.loading import load_recipe
from qatkit.tasks import TASKS, Scores, agree
from qatkit.tasks.detection import check_model
from tests.data.files import write_boxes

BOX = [0.5, 0.5, 0.4, 0.4]


def scored(logits: list[list[list[float]]], boxes: list[list[list[float]]], truth: list[list[int]]) -> float:
    """The precision of queries; each image has `BOX` once for each of its true classes."""
    scores = Scores(TASKS["detection"])
    labels = [
        {"class_labels": torch.tensor(each), "boxes": torch.tensor([BOX] * len(each)).view(-1, 4)} for each in truth
    ]
    outputs = torch.cat([torch.tensor(logits), torch.tensor(boxes)], dim=-1)
    scores.add(outputs, {"labels": labels})
    return scores.metrics()["map"]


def test_the_precision_is_that_of_coco() -> None:
    first, none = [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]
    off = [0.5, 0.5, 0.4, 0.3]  # IoU 0.75: right for 6 of the 10 thresholds
    assert scored([[first, none]], [[BOX, BOX]], [[0]]) == pytest.approx(1.0)
    assert scored([[first, none]], [[off, [0.1, 0.1, 0.1, 0.1]]], [[0]]) == pytest.approx(0.6)
    assert scored([[first, none]], [[BOX, BOX]], [[1]]) == 0.0
    # the second image has another class, which the model finds with a box elsewhere
    found = scored([[first], [[0.0, 9.0, 0.0]]], [[BOX], [[0.1, 0.1, 0.1, 0.1]]], [[0], [1]])
    assert found == pytest.approx(0.5)
    with pytest.raises(QatkitError, match="no image has a box"):
        scored([[first]], [[BOX]], [[]])


@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_outputs_that_are_not_finite_have_no_precision(where: str) -> None:
    """COCO's code counts a NaN box as found, so a diverged model would be perfect."""
    logits, box = ([nan] * 3, BOX) if where == "logits" else ([9.0, 0.0, 0.0], [nan] * 4)
    assert math.isnan(scored([[logits]], [[box]], [[0]]))


def test_models_agree_on_a_box_if_its_class_and_its_sides_agree() -> None:
    ours = torch.tensor([[[9.0, 0.0, 0.0, *BOX]] * 4])
    theirs = ours.clone()
    theirs[0, 1, 1] = 10.0  # another class
    theirs[0, 2, -1] += 0.02  # 2% of the image
    theirs[0, 3, -1] += 0.005
    assert agree(ours, theirs, torch.empty(0), TASKS["detection"]) == 2
    assert agree(ours, torch.full_like(ours, nan), torch.empty(0), TASKS["detection"]) == 0


def detector(folder: Path, stage: str = "") -> Recipe:
    path = folder / "boxes" / "boxes.jsonl"
    if not path.exists():
        assert write_boxes(folder / "boxes") == path
    (folder / "boxes.yaml").write_text(f"""
name: boxes
model:
  factory: qatkit.models:untrained_model
  args:
    family: yolos
    head: ObjectDetection
    num_classes: 2
    config: {{hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8, image_size: [16, 16], patch_size: 8, num_detection_tokens: 3}}
data: {{factory: "qatkit.data:image_detection", args: {{source: {{path: {path}}}, classes: [red, blue], images: {{size: 16}}}}}}
stages:
  dense: {{max_steps: 2, batch_size: 4{stage}}}
""")  # noqa: E501
    return load_recipe(folder / "boxes.yaml")


def test_what_fails_late_is_refused_by_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate_recipe(detector(tmp_path))
    with pytest.raises(
        QatkitError,
        match=r"^stages\.dense\.early_stopping: early stopping monitors the validation loss, but models",
    ):
        validate_recipe(detector(tmp_path, ", early_stopping: {patience: 1}"))
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(QatkitError, match=r"^task 'detection' needs pycocotools and scipy, .* 'qatkit\[detection\]'"):
        validate_recipe(detector(tmp_path))


def batches(folder: Path, objects: Any = None) -> Any:
    path = write_boxes(folder / "boxes")
    if objects is not None:
        path.write_text(f"{path.read_text()}\n{json.dumps({'image': '0.png', 'objects': objects})}")
    source = Source(str(path), val_fraction=0.2, test_fraction=0.2)
    return image_detection(source, ["red", "blue"], images=ImageFormat(size=16), batch_size=40)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_boxes_are_relative_and_flipped_with_their_image(tmp_path: Path) -> None:
    train = batches(tmp_path).train
    centers = set()
    for number in range(8):
        train.set_pass(number)
        image, label = train[0]["pixel_values"], train[0]["labels"]
        (x, y, w, h), color = label["boxes"][0].tolist(), 2 * int(label["class_labels"][0])
        assert (w, h) == (0.5, 0.5)
        channel: Tensor = image[color]
        assert channel[int(16 * y), int(16 * x)] > channel.mean() + 0.5
        centers.add((x, y))
    (left, y), (right, other_y) = sorted(centers)  # the same image as it is, and flipped
    assert (left, right) == (0.25, 0.75)
    assert y == other_y


def test_a_resized_image_is_noticed(tmp_path: Path) -> None:
    data = batches(tmp_path)
    data.prepare_data()
    for path in (tmp_path / "boxes").glob("*.png"):
        Image.open(path).resize((8, 8)).save(path)
    given = Source(str(tmp_path / "boxes" / "boxes.jsonl"), val_fraction=0.2, test_fraction=0.2)
    with pytest.raises(QatkitError, match="outside the image of 8 x 8 pixels"):
        image_detection(given, ["red", "blue"], images=ImageFormat(size=16)).prepare_data()


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ([[1, 2, 3, 4]], "column 'objects' does not contain lists 'bbox' and 'category' of equal length"),
        ({"bbox": [[1, 2, 3, 4]], "category": []}, "column 'objects' does not contain lists 'bbox' and 'category'"),
        ({"bbox": [[1, 2, 3, 4]], "category": ["green"]}, "box 1 of column 'objects': category \"green\" is neither"),
        ({"bbox": [[1, 2, 0, 4]], "category": [0]}, r"box 1 of column 'objects' is \[1, 2, 0, 4\], which is empty or"),
        ({"bbox": [[16, 2, 1, 4]], "category": [0]}, r"box 1 of .* is \[16, 2, 1, 4\], which is empty or outside the"),
        ({"bbox": [[2, -1, 4, 1]], "category": [0]}, r"box 1 of .* is \[2, -1, 4, 1\], which is empty or outside the"),
        ({"bbox": [[0.5, 2, 10**400, 4]], "category": [0]}, "box 1 of .*, which is empty or outside the image"),
        ({"bbox": [[1, 2, 3, 44]], "category": [0]}, "box 1 of .* outside the image of 16 x 16 pixels"),
    ],
)
def test_a_bad_box_is_named(objects: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=rf"^.*boxes\.jsonl:61: {problem}"):
        batches(tmp_path, objects).prepare_data()


def test_a_model_without_no_object_is_refused() -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    with pytest.raises(QatkitError, match=r"^model: 'vit' models are not supported by the task 'detection'; use"):
        check_model(untrained_model("vit", "ImageClassification", small))
    check_model(torch.nn.Linear(1, 1))  # a user's own model declares nothing
