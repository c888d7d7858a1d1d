"""Folders with one subfolder: every file in them counts, or is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qatkit import QatkitError, QatkitWarning
from qatkit.data import Source, audio_classification, image_classification, image_segmentation
from qatkit.data.pictures import ImageFormat
from tests.data.files import write_images, write_tones

SMALL = ImageFormat(size=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source(path: Path, **options: Any) -> Source:
    return Source(str(path), **{"val_fraction": 0.2, "test_fraction": 0.2, **options})


def samples(given: Source, classes: list[str] | None = None) -> int:
    data = image_classification(given, classes, images=SMALL)
    data.prepare_data()
    return sum(len(split) for split in (data.train, data.val, data.test))  # type: ignore[arg-type]


def splits(folder: Path) -> Path:
    for name in ("train", "val"):
        write_images(folder / "photos" / name, ["cat", "dog"])
    return folder / "photos"


def flat(folder: Path) -> Path:
    return write_images(folder, ["photos"]) / "photos"


def one(folder: Path) -> Path:
    return write_images(folder / "photos", ["cat"])


def empty(folder: Path) -> Path:
    (write_images(folder / "photos", ["cat"]) / "dog").mkdir()
    return folder / "photos"


def hollow(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
    return folder / "photos"


def table(folder: Path) -> Path:
    (folder / "photos.jsonl").touch()
    return folder / "photos.jsonl"


@pytest.mark.parametrize(
    ("make", "classes", "problem"),
    [
        (splits, None, r"source\.path: '.*photos' contains the subfolders \['train', 'val'\], which are splits"),
        (splits, ["cat", "dog"], r"source\.path: '.*photos' contains the subfolders \['train', 'val'\], which are"),
        (flat, None, r"source\.path: '.*photos' contains no subfolder; put the files of each class in a"),
        (flat, ["cat", "dog"], r"source\.path: '.*photos' contains no subfolder with files; put the files of each"),
        (one, None, r"source\.path: '.*photos' contains only one subfolder, 'cat'; put the files of each"),
        (
            one,
            ["cat", "dog"],
            r"source\.path: '.*photos' contains no files of the class 'dog'; add files to the",
        ),
        (
            one,
            ["kat", "dog"],
            r"source\.path: '.*photos' contains the subfolder 'cat', which is not one of the classes",
        ),
        (empty, None, r"source\.path: '.*photos' contains no files of the class 'dog'; add files to the .*, or"),
        (
            hollow,
            None,
            r"source\.path: '.*photos' contains no subfolder with files; put the files of each class in a separate",
        ),
        (
            lambda folder: folder / "photos",
            None,
            r"source\.path: there is no folder '.*photos'; use an existing",
        ),
        (
            lambda folder: folder / "photos",
            ["cat", "dog"],
            r"source\.path: '.*photos' matches no file; use the",
        ),
        (table, None, r"classes: is not set, and '.*photos\.jsonl' is a table, not a folder with one subfolder"),
    ],
)
def test_a_folder_that_is_not_one_of_classes_is_named(
    make: Callable[[Path], Path], classes: list[str] | None, problem: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(QatkitError, match=f"^{problem}"):
        image_classification(source(path), classes, images=SMALL).prepare_data()
    with pytest.raises(QatkitError, match=f"^{problem}"):
        audio_classification(source(path), 0.1, classes).prepare_data()


def test_only_data_with_one_class_each_may_be_a_folder(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat", "dog"])
    with pytest.raises(QatkitError, match=r"^source\.path: '.*photos' is a folder; use the path of an existing"):
        image_segmentation(source(path), ["a", "b"], images=SMALL).prepare_data()


def test_folders_of_splits_are_given_one_by_one_and_may_be_classes_if_they_are_named(tmp_path: Path) -> None:
    path = splits(tmp_path)
    shutil.rmtree(path / "val" / "dog")  # only training needs files of each class
    assert samples(source(path / "train", val=str(path / "val"))) == 90
    assert samples(source(path), ["train", "val"]) == 90


def test_folders_may_be_named_by_indices_and_other_folders_are_skipped_by_wish(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["0", "1"])
    assert samples(source(path), ["cat", "dog"]) == 60
    (path / "1").rename(path / "unsorted")
    write_images(path, ["0", "1"])
    with pytest.warns(QatkitWarning, match="skipped 30 of 90 records; first: .*unsorted"):
        assert samples(source(path, skip_bad=True), ["cat", "dog"]) == 60


def test_hidden_files_do_not_count_linked_folders_do_and_files_beside_the_folders_are_reported(tmp_path: Path) -> None:
    path = write_images(tmp_path / "photos", ["cat", "dog"])
    for hidden in (path / ".cache", path / "cat" / ".ipynb_checkpoints"):
        shutil.copytree(path / "dog", hidden)
    (path / "cat" / ".DS_Store").write_text("x")
    assert samples(source(path)) == 60
    more = write_images(tmp_path / "elsewhere", ["more"]) / "more"
    (path / "dog" / "linked").symlink_to(more)
    (more / "around").symlink_to(path / "dog")  # a circle
    assert samples(source(path)) == 90
    shutil.copy(path / "cat" / "0.png", path / "stray.png")
    with pytest.warns(QatkitWarning, match=r"source\.path: '.*photos' contains files outside .* such as 'stray\.png'"):
        assert samples(source(path)) == 90
    (path / "stray.png").unlink()
    (path / "cat" / "broken.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(QatkitError, match=r"cat/broken\.png: column 'image' refers to .*, which does not exist"):
        samples(source(path))


def test_recordings_in_linked_folders_count_too(tmp_path: Path) -> None:
    path = write_tones(tmp_path / "tones", {"low": 300.0})
    (path / "high").symlink_to(write_tones(tmp_path / "other", {"high": 1500.0}) / "high")
    data = audio_classification(source(path), 0.1)
    data.prepare_data()
    assert data.classes == ["high", "low"]
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 48  # type: ignore[arg-type]
