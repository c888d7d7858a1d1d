"""Images and recordings from folders, tables and parquet files; bad ones are named before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from datasets import Dataset
from PIL import Image

from qatkit import QatkitError, QatkitWarning
from qatkit.data import (
    Source,
    audio_classification,
    image_classification,
    image_multilabel,
    image_segmentation,
)
from qatkit.data.hub_records import _loaded
from qatkit.data.media import MediaRecords, content_of, media_in
from qatkit.data.pictures import ImageFormat, center_box, random_box
from qatkit.recipe.loading import load_recipe
from qatkit.run.fingerprint import stage_inputs
from tests.data.files import write_images, write_masks, write_tones

SMALL = ImageFormat(size=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source(path: Path, **options: Any) -> Source:
    return Source(str(path), val_fraction=0.2, test_fraction=0.2, **options)


def colors(folder: Path) -> Path:
    """A table with an image that is red on the left and blue on the right, many times."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 255
    Image.fromarray(pixels).save(folder / "colors.png")
    rows = [{"image": "colors.png", "label": index % 2, "number": index} for index in range(40)]
    (folder / "colors.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "colors.jsonl"


def test_evaluation_sees_the_center_with_the_normalization_of_imagenet(tmp_path: Path) -> None:
    data = image_classification(source(colors(tmp_path)), ["a", "b"], images=SMALL)
    images, _ = next(iter(data.test_dataloader()))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    left, right = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert torch.allclose(images[0, :, 4, 0], (left - mean) / std, atol=1e-6)
    assert torch.allclose(images[0, :, 4, -1], (right - mean) / std, atol=1e-6)
    assert center_box(256, 512) == (16.0, 144.0, 240.0, 368.0)


def test_training_images_differ_in_each_pass_and_repeat_in_a_resumed_one(tmp_path: Path) -> None:
    train = image_classification(source(colors(tmp_path)), ["a", "b"], images=SMALL).train
    assert isinstance(train, MediaRecords)
    first = [train[index][0] for index in range(12)]
    assert any(not torch.equal(first[0], other) for other in first[1:])  # all are the same picture
    assert any(image[0, 4, 0] < image[0, 4, -1] for image in first)  # flipped
    train.set_pass(1)
    assert any(not torch.equal(train[index][0], image) for index, image in enumerate(first))
    train.set_pass(0)
    assert all(torch.equal(train[index][0], image) for index, image in enumerate(first))


def test_random_parts_lie_in_the_image_and_cover_the_ranges_of_torchvision() -> None:
    draw = torch.Generator().manual_seed(0)
    boxes = [random_box(300, 200, draw) for _ in range(400)]
    assert all(0 <= left < right <= 300 and 0 <= top < bottom <= 200 for left, top, right, bottom in boxes)
    areas = [(right - left) * (bottom - top) / 60000 for left, top, right, bottom in boxes]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.08 <= min(areas) < 0.15
    assert 0.7 < max(areas) <= 1
    assert 0.75 <= min(ratios) < 0.8
    assert 1.25 < max(ratios) <= 4 / 3 + 1e-9
    assert random_box(1000, 10, draw) == pytest.approx((493.333, 0, 506.667, 10), abs=1e-3)


def test_a_mask_is_cropped_and_flipped_with_its_image(tmp_path: Path) -> None:
    data = image_segmentation(source(write_masks(tmp_path / "s")), ["dark", "bright"], images=ImageFormat(size=24))
    for split in (data.train, data.test):
        for index in range(6):
            image, mask = split[index]
            bright, dark = image[:, mask == 1].mean(), image[:, mask == 0]
            assert bright - (dark.mean() if dark.numel() else -1.0) > 0.8
    assert (data.test[0][1] == -100).sum() == 4  # the last of 12 x 12 pixels


@pytest.mark.parametrize("folder", ["train", "elsewhere"])
def test_splits_do_not_depend_on_where_the_folder_lies(folder: str, tmp_path: Path) -> None:
    data = image_classification(source(write_images(tmp_path / folder, ["cat", "dog"])), images=SMALL)
    assert data.classes == ["cat", "dog"]
    assert [len(split) for split in (data.train, data.val, data.test)] == [43, 7, 10]  # type: ignore[arg-type]


def test_a_parquet_file_of_datasets_has_the_images_of_the_files(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "s")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = {key: [str(path.parent / row[key]) for row in rows] for key in ("image", "mask")}
    made = Dataset.from_dict(columns)
    made = made.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    made.to_parquet(tmp_path / "s.parquet")
    given = {name: source(file) for name, file in (("files", path), ("parquet", tmp_path / "s.parquet"))}
    seen = {}
    for name, each in given.items():
        data = image_segmentation(each, ["dark", "bright"], images=SMALL)
        data.prepare_data()
        seen[name] = {str((*image.flatten().tolist(), mask.sum())) for image, mask in data.test}  # type: ignore[attr-defined]
    assert seen["parquet"]
    whole = image_segmentation(source(path), ["dark", "bright"], images=ImageFormat(size=8, augment=False))
    every = {
        str((*image.flatten().tolist(), mask.sum()))
        for split in (whole.train, whole.val, whole.test)
        for image, mask in (split[index] for index in range(len(split)))  # type: ignore[arg-type]
    }
    assert seen["parquet"] <= every


def spoiled(folder: Path, name: str, content: bytes) -> Path:
    path = write_images(folder / "photos", ["cat", "dog"])
    (path / "dog" / name).write_bytes(content)
    return path


def deep(folder: Path) -> Path:
    path = write_images(folder / "photos", ["cat", "dog"])
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(path / "dog" / "deep.png")
    return path


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: spoiled(folder, "a.png", b""), r"dog/a\.png: column 'image' cannot be decoded as an image"),
        (lambda folder: spoiled(folder, "a.png", b"\x89PNG\r\n\x1a\n"), r"dog/a\.png: .* cannot be decoded"),
        (deep, r"dog/deep\.png: column 'image' is an image with 16 bits per channel; convert it to 8 bits"),
    ],
)
def test_a_damaged_image_is_named_or_skipped(make: Callable[[Path], Path], problem: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(QatkitError, match=problem):
        image_classification(source(path), images=SMALL).prepare_data()
    with pytest.warns(QatkitWarning, match=rf"skipped 1 of 61 records; first: .*{problem.split(';')[0]}"):
        image_classification(source(path, skip_bad=True), images=SMALL).prepare_data()


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"image": "no.png", "mask": "0_mask.png"}, "column 'image': there is no file .*no.png"),
        ({"image": "0.png"}, r"has no column 'mask', only \['image'\]"),
        ({"image": "0.png", "mask": "0.png"}, "column 'mask' is an image of mode RGB, not class indices"),
        ({"image": "0.png", "mask": "wide.png"}, "column 'mask' has 9 x 3 pixels, but the image has 12 x 12"),
        ({"image": "0.png", "mask": "seven.png"}, "column 'mask' has pixels of class 7, but there are 2 classes"),
    ],
)
def test_a_bad_mask_is_named_by_file_and_line(record: dict[str, str], problem: str, tmp_path: Path) -> None:
    path = write_masks(tmp_path / "s")
    Image.fromarray(np.zeros((3, 9), np.uint8)).save(path.parent / "wide.png")
    Image.fromarray(np.full((12, 12), 7, np.uint8)).save(path.parent / "seven.png")
    path.write_text(f"{path.read_text()}\n{json.dumps(record)}")
    with pytest.raises(QatkitError, match=rf"^.*images\.jsonl:61: {problem}"):
        image_segmentation(source(path), ["dark", "bright"], images=SMALL).prepare_data()


def test_labels_that_are_no_list_and_folders_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"colors\.jsonl:1: column 'labels' contains NoneType, not a list of labels"):
        image_multilabel(source(colors(tmp_path)), ["a", "b"], images=SMALL).prepare_data()
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "dog").mkdir()
    with pytest.raises(QatkitError, match=r"^source\.path: '.*empty' has no folder with files; put the files of each"):
        image_classification(source(tmp_path / "empty"), images=SMALL).prepare_data()
    with pytest.raises(QatkitError, match=r"^source\.path: '.*empty' is a folder"):
        image_segmentation(source(tmp_path / "empty"), ["a", "b"], images=SMALL).prepare_data()


def test_a_file_that_disappears_during_training_is_named(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat", "dog"])
    data = image_classification(source(path), images=SMALL)
    data.prepare_data()
    (path / "cat" / "0.png").unlink()
    with pytest.raises(QatkitError, match=r"^.*cat/0\.png: sample \d+ can no longer be read"):
        [split[index] for split in (data.train, data.val, data.test) for index in range(len(split))]  # type: ignore[arg-type]


def test_a_run_notices_a_changed_folder(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat", "dog"])
    (tmp_path / "any.yaml").write_text(
        f'name: any\nmodel: {{factory: "qatkit.models:cnn"}}\n'
        f'data: {{factory: "qatkit.data:image_classification", args: {{source: {{path: {path}}}}}}}\n'
        "stages: {dense: {max_steps: 1}}\n"
    )
    before = stage_inputs(load_recipe(tmp_path / "any.yaml"), "dense")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path / "cat" / "0.png")
    after = stage_inputs(load_recipe(tmp_path / "any.yaml"), "dense")
    assert [key for key in after if after[key] != before[key]] == ["data.args.source.path (content)"]


def test_recordings_are_resampled_cropped_padded_and_normalized(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    data = audio_classification(source(folder), seconds=0.1, batch_size=8, sampling_rate=16000)
    assert data.classes == ["high", "low"]
    waves, labels = next(iter(data.test_dataloader()))
    assert waves.shape[1] == 1600
    for wave, label in zip(waves, labels, strict=True):
        heard = wave[: int(wave.nonzero().max()) + 1]  # without the padding
        assert abs(float(heard.mean())) < 1e-2
        assert float(heard.std()) == pytest.approx(1.0, abs=2e-2)
        loudest = torch.fft.rfft(heard, 16000).abs().argmax()
        assert int(loudest) == pytest.approx({0: 1500, 1: 300}[int(label)], abs=12)


def test_a_bad_recording_is_named(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    bad = folder / "low" / "bad.wav"
    for samples, problem in (
        (np.array([0.0, np.nan] * 99), "contains NaN or infinite"),
        (np.zeros(0), "has no samples"),
    ):
        soundfile.write(bad, samples, 8000, subtype="FLOAT")
        with pytest.raises(QatkitError, match=rf"^.*low/bad\.wav: column 'audio' {problem}"):
            audio_classification(source(folder), seconds=0.1).prepare_data()
    bad.write_text("hello")
    with pytest.raises(QatkitError, match=r"^.*low/bad\.wav: column 'audio' cannot be decoded as audio"):
        audio_classification(source(folder), seconds=0.1).prepare_data()
    bad.unlink()
    with pytest.raises(QatkitError, match=r"^seconds: 0\.0 seconds at a sampling rate of 16000 are 0 samples"):
        audio_classification(source(folder), seconds=0.0)


def test_recordings_in_a_parquet_file_are_read_as_datasets_stores_them(tmp_path: Path) -> None:
    folder = write_tones(tmp_path / "tones", {"low": 300.0, "high": 1500.0})
    files = sorted(folder.rglob("*.wav"))
    rows = {
        "audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "label": [int(file.parent.name == "low") for file in files],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "tones.parquet")
    data = audio_classification(source(tmp_path / "tones.parquet"), seconds=0.05, classes=["high", "low"])
    assert next(iter(data.test_dataloader()))[0].shape[1] == 800


def test_a_data_set_of_the_hub_yields_encoded_images(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat"], each=3) / "cat" / "0.png"
    made = Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "set" / "train.parquet")
    (record,) = _loaded(Source(str(tmp_path / "set")), "train")
    assert content_of(media_in(record, "image")) == path.read_bytes()  # type: ignore[arg-type]  # no BadRecord
