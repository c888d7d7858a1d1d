"""Files of every type give the same records, and one that cannot be read is named by its file and line."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qatkit import QatkitError
from qatkit.data import Source, causal_text
from qatkit.data.columns import text_in
from qatkit.data.files import read_file
from qatkit.data.source import BadRecord
from qatkit.errors import QatkitWarning
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines

TEXTS = [" ".join(text.splitlines()) for text in SENTENCES] + ["eins, zwei", 'she said "three"', "vier\tfünf", "六"]
SHARES = {"val_fraction": 0.2, "test_fraction": 0.2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer")


def write_table(path: Path, texts: list[str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([["text"], *([t] for t in texts)])
    return path


def read(path: Path) -> tuple[list[str], dict[str, str]]:
    """The texts of a file, and the reason at each place where one cannot be used."""
    records = list(read_file(path, lines=False))
    bad = {where.removeprefix(f"{path}:"): str(found) for where, found in records if isinstance(found, BadRecord)}
    return [found["text"] for _, found in records if not isinstance(found, BadRecord)], bad


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "txt", "lines"])
def test_a_source_of_any_type_gives_the_tokens_of_the_same_texts_in_jsonl(
    kind: str, tmp_path: Path, tokenizer: str
) -> None:
    texts = TEXTS if kind == "lines" else [*TEXTS, "over\ntwo lines", "and\n\nthree"]
    lines, path = False, tmp_path / f"texts.{kind}"
    if kind in ("csv", "tsv"):
        write_table(path, texts)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=30)
    elif kind == "lines":
        path, lines = write_lines(tmp_path / "texts.txt", texts), True
    else:
        path = tmp_path / "*.txt"
        for number, text in enumerate(texts):
            (tmp_path / f"{number:03}.txt").write_text(text, encoding="utf-8")
    json_lines = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    wanted = causal_text(Source(str(json_lines), **SHARES), tokenizer, context=16)
    found = causal_text(Source(str(path), lines=lines, **SHARES), tokenizer, context=16)
    assert found.folder != wanted.folder
    for split in ("train", "val", "test"):
        expected = (wanted.folder / split / "input_ids.bin").read_bytes()
        assert len(expected) > 100
        assert (found.folder / split / "input_ids.bin").read_bytes() == expected


def test_a_byte_of_another_encoding_costs_its_own_row_of_a_table_alone(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"row {number} of words" for number in range(600)]
    lines = [b"text", *(text.encode() for text in texts)]
    lines[501] += b" \xe9t\xe9"
    path = tmp_path / "texts.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found, bad = read(path)
    assert found == texts[:500] + texts[501:]
    assert list(bad) == ["502"]
    with pytest.raises(QatkitError, match=r"texts\.csv:502: is not UTF-8 \(.* byte 0xe9 .*\); fix the record, or"):
        causal_text(Source(str(path), **SHARES), tokenizer, context=16).prepare_data()
    skipping = causal_text(Source(str(path), **SHARES, skip_bad=True), tokenizer, context=16)
    with pytest.warns(QatkitWarning, match=r"skipped 1 of 600 records; first: .*texts\.csv:502: is not UTF-8"):
        skipping.prepare_data()


def test_rows_that_do_not_fit_the_head_of_a_table_are_named_by_the_line_they_begin_in(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text('\n\ntext\none\n\n"two\nlines"\nthree,more\n"four"x\nfive\n"six\nnever closed\n')
    found, bad = read(path)
    assert found == ["one", "two\nlines", "five"]
    assert bad == {
        "8": "has 2 columns, but the header has 1",
        "9": "is not a valid row (',' expected after '\"')",
        "11": "is not a valid row, up to line 12 (unexpected end of data)",
    }
    for head in (b"t\xe9xt\none\n", b'"te"xt\none\n'):
        path.write_bytes(head)
        with pytest.raises(QatkitError, match=r"texts\.csv:1: the header is not a valid row \(.*\); fix the header"):
            read(path)


def test_a_field_of_a_table_may_be_a_long_document(tmp_path: Path) -> None:
    texts = ["short", "long " * 40_000, "short again"]
    assert read(write_table(tmp_path / "texts.csv", texts)) == (texts, {})


@pytest.mark.parametrize(
    ("damaged", "said"), [(60, "is not a Parquet file, or is corrupt"), (-2000, "is corrupt after")]
)
def test_a_damaged_parquet_file_is_named(damaged: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    texts = [f"{number * 7919 % 100_003} " * 3 for number in range(70_000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    whole = bytearray(path.read_bytes())
    start = damaged % (len(whole) - pq.ParquetFile(path).metadata.serialized_size)
    for index in range(start, start + 100):
        whole[index] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(QatkitError, match=rf"texts\.parquet: {said}.* \(.+\); restore or recreate the file"):
        read(path)
    path.write_bytes(whole[:200])
    with pytest.raises(QatkitError, match=r"texts\.parquet: is not a Parquet file.*; restore or recreate the file"):
        read(path)


def test_half_of_a_character_is_a_bad_record(tmp_path: Path) -> None:

    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "na\\u00efve \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    first, second = (text_in(record, "text") for _, record in read_file(path, lines=False))  # type: ignore[arg-type]
    assert first == "naïve 😀"
    assert isinstance(second, BadRecord)
    assert "half of a pair" in str(second)


def test_json_that_is_nested_too_deeply_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "one"}}\n{{"text": {"[" * 100_000}}}\n{{"text": "two"}}\n')
    assert read(path) == (["one", "two"], {"2": "is JSON that is nested too deeply"})
