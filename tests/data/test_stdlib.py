"""The standard library as a corpus: which files it takes, and that held-out files stay held out everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qatkit import QatkitError
from qatkit.data import stdlib_text
from qatkit.data.stdlib import split_files, stdlib_files, stdlib_tokens


def test_the_library_is_read_without_tests_packages_and_generated_tables() -> None:
    files = stdlib_files()
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(files)
    assert list(files) == sorted(files)
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    assert not [name for name in files if left_out & set(name.split("/")[:-1])]
    assert sum(path.stat().st_size for path in files.values()) > 5e6


def test_names_have_forward_slashes_and_do_not_depend_on_where_the_library_is(tmp_path: Path) -> None:
    for name in ("b.py", "pkg/a.py", "pkg/test/x.py", "config-3.11-x86/y.py", "_sysconfigdata__linux.py", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert list(stdlib_files(tmp_path)) == ["b.py", "pkg/a.py"]
    assert list(stdlib_files(tmp_path, ["pkg/*"])) == ["pkg/a.py"]


def test_what_does_not_belong_is_not_even_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    # an interpreter's site-packages may hold so many files that listing them takes most of a short run
    scandir, seen = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda folder: seen.append(Path(folder).name) or scandir(folder))
    stdlib_files()
    assert {"json", "asyncio"} <= set(seen)
    assert not {"site-packages", "test", "encodings"} & set(seen)


def test_a_glob_that_matches_no_file_is_an_error() -> None:
    with pytest.raises(QatkitError, match=r"include: 'jsn/\*' matches no file in the standard library"):
        stdlib_text(include=["json/*", "jsn/*"]).prepare_data()


def test_the_split_of_a_file_depends_on_its_name_alone() -> None:
    files = {f"m{index}.py": Path(f"m{index}.py") for index in range(1000)}
    whole = split_files(files, 0.1, 0.2)
    half = split_files({name: files[name] for name in list(files)[::2]}, 0.1, 0.2)
    for split, found in half.items():
        assert set(found) == set(whole[split]) & set(list(files)[::2])
    assert [len(whole[split]) for split in ("train", "val", "test")] == pytest.approx([700, 100, 200], abs=45)


def test_the_split_is_the_place_of_the_sha256_of_the_name_between_0_and_1() -> None:
    # `printf m0.py | sha256sum` gives 9687071f..., and 0x9687071f / 2**32 is 0.58800
    others = {f"o{index}.py": Path() for index in range(100)}
    for val, test, split in ((0.589, 0.2, "val"), (0.587, 0.2, "test"), (0.3, 0.287, "train")):
        assert "m0.py" in split_files({**others, "m0.py": Path()}, val, test)[split]


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.1), (0.5, 0.5), (0.1, 1.0)])
def test_shares_that_leave_a_split_empty_are_refused(val: float, test: float) -> None:
    with pytest.raises(QatkitError, match=r"fraction: .* set val_fraction"):
        split_files({}, val, test)


def test_too_few_files_for_three_splits_are_refused() -> None:
    with pytest.raises(QatkitError, match=r"include: 1 files leave none for .*; include more files"):
        split_files({"a.py": Path("a.py")}, 0.1, 0.1)


def test_tokens_are_those_of_the_files_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = stdlib_tokens(400, ("email/*",), 0.2, 0.2)
    data = stdlib_text(16, 400, ("email/*",), 0.2, 0.2, batch_size=8)
    splits = split_files(stdlib_files(include=["email/*"]), 0.2, 0.2)
    tokens = np.load(folder / "test.npy")
    texts = data.tokenizer.decode(tokens.tolist()).split("<|endoftext|>")
    assert texts == [*(path.read_text() for path in splits["test"].values()), ""]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 16)
    assert int(batch["input_ids"].max()) < 400
    assert len(list((tmp_path / "qatkit").iterdir())) == 1
    written = (folder / "train.npy").stat().st_mtime_ns
    assert stdlib_tokens(400, ("email/*",), 0.2, 0.2) == folder
    assert (folder / "train.npy").stat().st_mtime_ns == written
    assert stdlib_tokens(401, ("email/*",), 0.2, 0.2) != folder
