"""Images from folders, tables and parquet files; bad ones are named before training."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from qatkit import QatkitError, QatkitWarning
from qatkit.data import (
    Source,
    image_classification,
    image_multilabel,
    image_segmentation,
)
from qatkit.data.hub_records import _loaded
from qatkit.data.media import MediaRecords, content_of, media_in
from qatkit.data.pictures import ImageFormat, center_box, decoded_mask, random_box
from qatkit.recipe.loading import load_recipe
from qatkit.run.fingerprint import stage_inputs
from tests.data.files import write_images, write_masks

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
        ({"image": "no.png", "mask": "0_mask.png"}, "column 'image' refers to .*no.png, which does not exist"),
        ({"image": "0.png"}, r"has no column 'mask'; its columns are \['image'\]"),
        ({"image": "0.png", "mask": "0.png"}, "column 'mask' is an image of mode RGB, not one of class indices"),
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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_mask_with_fewer_bits_per_pixel_has_the_same_classes(bits: int) -> None:
    classes = (np.arange(64).reshape(8, 8) % 2**bits % 5).astype(np.uint8)
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in classes]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    mask = decoded_mask(content, "mask", classes=5, ignored=255)
    assert np.array_equal(np.array(mask), classes)


def test_a_mask_is_turned_upright_as_its_image(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "s")
    whole = ImageFormat(size=12, augment=False)
    upright = image_segmentation(source(path), ["dark", "bright"], images=whole)
    expected = [upright.test[index] for index in range(len(upright.test))]  # type: ignore[arg-type]
    for file in path.parent.glob("*.png"):
        turned = Image.open(file).transpose(Image.Transpose.ROTATE_90)
        exif = turned.getexif()
        exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
        turned.save(file, exif=exif)
    found = image_segmentation(source(path), ["dark", "bright"], images=whole).test
    for index, (image, mask) in enumerate(expected):
        assert torch.equal(found[index][0], image)
        assert torch.equal(found[index][1], mask)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "column 'image' is empty"),
        ({"bytes": None, "path": None}, "column 'image' is empty"),
        ({"bytes": 3}, "column 'image' contains int, not a file"),
        (0, "column 'image' contains int, not a file"),
        ([], "column 'image' contains list, not a file"),
        ("x" * 3000, "a file cannot be read"),
        (".", "column 'image' refers to .*, which does not exist"),
        pytest.param(
            "/proc/self/mem", "a file cannot be read",
            marks=pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux"),
        ),
    ],
)  # fmt: skip
def test_a_value_that_is_no_readable_file_is_a_bad_record(value: object, problem: str, tmp_path: Path) -> None:
    path = colors(tmp_path)
    path.write_text(f"{path.read_text()}\n{json.dumps({'image': value, 'label': 0})}")
    with pytest.warns(QatkitWarning, match=rf"skipped 1 of 41 records; first: .*colors\.jsonl:41: {problem}"):
        image_classification(source(path, skip_bad=True), ["a", "b"], images=SMALL).prepare_data()


def test_a_path_beside_missing_bytes_is_relative_to_its_table(tmp_path: Path) -> None:
    path = colors(tmp_path)
    rows = [{"image": {"bytes": None, "path": "colors.png"}, "label": index % 2, "n": index} for index in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    image_classification(source(path), ["a", "b"], images=SMALL).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: 0 is out of range"),
        ({"mean": [0.5]}, r"mean: \[0\.5\] has 1 values, but the images have 3 channels; use 3"),
        ({"mean": [0.5, nan, 0.5]}, r"mean: \[0\.5, nan, 0\.5\] is not finite"),
        ({"std": [inf, 1.0, 1.0]}, r"std: \[inf, 1\.0, 1\.0\] is not finite"),
        ({"std": [0.0, 1.0, 1.0]}, r"std: \[0\.0, 1\.0, 1\.0\] is out of range; use positive numbers"),
    ],
)
def test_an_impossible_image_format_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=f"^{message}"):
        ImageFormat(**options)


def test_labels_that_are_no_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"colors\.jsonl:1: column 'labels' contains NoneType, not a list of labels"):
        image_multilabel(source(colors(tmp_path)), ["a", "b"], images=SMALL).prepare_data()


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
    (path / ".ipynb_checkpoints").mkdir()
    (path / "cat" / ".DS_Store").touch()
    (path / ".ipynb_checkpoints" / "0.png").touch()
    assert stage_inputs(load_recipe(tmp_path / "any.yaml"), "dense") == after


def test_a_run_notices_a_changed_file_that_a_table_names(tmp_path: Path) -> None:
    path = write_masks(tmp_path / "scenes")
    (tmp_path / "any.yaml").write_text(
        f'name: any\nmodel: {{factory: "qatkit.models:cnn"}}\n'
        f'data: {{factory: "qatkit.data:image_segmentation", args: {{source: {{path: {path}}}, classes: [a, b]}}}}\n'
        "stages: {dense: {max_steps: 1}}\n"
    )
    before = stage_inputs(load_recipe(tmp_path / "any.yaml"), "dense")
    for name in ("0.png", "1_mask.png"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(path.parent / name)
        after = stage_inputs(load_recipe(tmp_path / "any.yaml"), "dense")
        changed = [key for key in after if after[key] != before[key]]
        assert changed == ["data.args.source.path, files named there (content)"]
        before = after


@pytest.mark.parametrize("named", ["folder", "table"])
def test_a_repaired_file_is_used_again(named: str, tmp_path: Path) -> None:
    if named == "folder":
        path = write_images(tmp_path / "photos", ["cat", "dog"])
        file, given, classes = path / "cat" / "0.png", source(path, skip_bad=True), None
    else:
        path = colors(tmp_path)
        file = Path(shutil.copy(tmp_path / "colors.png", tmp_path / "more.png"))
        path.write_text(f'{path.read_text()}\n{{"image": "more.png", "label": 0}}')
        given, classes = source(path, skip_bad=True), ["a", "b"]
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))  # of the same size
    with pytest.warns(QatkitWarning, match=r"skipped 1 of \d+ records"):
        image_classification(given, classes, images=SMALL).prepare_data()
    file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_classification(given, classes, images=SMALL).prepare_data()


def test_a_data_set_of_the_hub_yields_encoded_images(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat"], each=3) / "cat" / "0.png"
    made = Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "set" / "train.parquet")
    (record,) = _loaded(Source(str(tmp_path / "set")), "train")
    assert content_of(media_in(record, "image")) == path.read_bytes()
