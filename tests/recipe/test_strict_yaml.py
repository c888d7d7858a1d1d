"""YAML is read as a person means it, and what is written reads back equal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatkit.recipe.strict_yaml import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("2:4", "2:4"),
        ("no", "no"),
        ("010", "010"),
        ("2026-01-31", "2026-01-31"),
        ("'1e-3'", "1e-3"),
        ("true", True),
        ("~", None),
    ],
)
def test_a_scalar_is_read_as_a_person_means_it(text: str, value: Any) -> None:
    read = parse_yaml(text, "test")
    assert read == value
    assert type(read) is type(value)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, database=None)
@given(PLAIN)
def test_whatever_is_written_as_yaml_reads_back_equal(value: Any) -> None:
    assert repr(parse_yaml(dump_yaml({"value": value}), "test")) == repr({"value": value})


@pytest.mark.parametrize(
    "text", ["1e-3", "2:4", "yes", "0o7", "null", "", " a", "a: b", "# c", "2020-01-01", "<<", "~", "\x85", "é"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml([text]), "test") == [text]
