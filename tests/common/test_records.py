"""Records: what is written is read, and a file that is damaged or does not fit is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qatkit import QatkitError
from qatkit.common.records import content_digest, misfit, read_signed, write_signed


@dataclass(frozen=True)
class Inner:
    part: tuple[str, int]


@dataclass(frozen=True)
class Kind:
    name: str
    losses: dict[str, float]
    inner: list[Inner]
    note: str | None = None


GOOD: dict[str, Any] = {
    "name": "a",
    "losses": {"x": 1.5, "y": float("nan")},
    "inner": [{"part": ["b", 2]}],
    "note": None,
}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_signed(path, Kind, 1, "again") is None
    write_signed(path, {"name": "ä", "losses": {}, "inner": [{"part": ("b", 2)}], "note": "\ud800"}, 1)
    assert read_signed(path, Kind, 1, "again") == {
        "name": "ä", "losses": {}, "inner": [{"part": ["b", 2]}], "note": "\ud800",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": None}, "name is a NoneType"),
        ({"name": True}, "name is a bool"),
        ({"losses": {"x": "1"}}, r"losses\.x is a str"),
        ({"losses": {"x": False}}, r"losses\.x is a bool"),
        ({"losses": []}, "losses is a list"),
        ({"inner": [{"part": ["b"]}]}, r"inner\[0\]\.part has 1 values instead of 2"),
        ({"inner": [{"part": ["b", 2.0]}]}, r"inner\[0\]\.part\[1\] is a float"),
        ({"inner": [[]]}, r"inner\[0\] is a list"),
        ({"inner": [{}]}, r"inner\[0\]\.part is missing"),
        ({"note": 1}, "note is a int"),
        ({"more": 1}, "unknown field more"),
        ({"schema": 2}, r"has schema 2, but this version of qatkit reads schema 1; again, or use"),
        ({"schema": True}, "has schema True"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert misfit(Kind, GOOD) is None
    write_signed(path, GOOD | change, 1)
    with pytest.raises(QatkitError, match=rf"{path} .*{reason}"):
        read_signed(path, Kind, 1, "again")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"1", b'"x"', b"[" * 5000, b"\xff{}", b"1" * 5000, b"{}"]
)
def test_a_torn_file_is_refused_by_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(QatkitError, match=rf"{tmp_path}/record\.json .*; (restore the file, or )?again"):
        read_signed(tmp_path / "record.json", Kind, 1, "again")


def test_an_edit_without_a_new_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_signed(path, GOOD, 1)
    content = json.loads(path.read_text())
    assert content["digest"] == content_digest(content)
    path.write_text(json.dumps(content | {"name": "b"}))
    with pytest.raises(QatkitError, match="the digest does not match the content"):
        read_signed(path, Kind, 1, "again")
