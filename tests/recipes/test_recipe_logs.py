"""The logs beside the shipped recipes: they show what the run's report shows, and are of the recipes as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.recipe_logs import LOGGED, finished, log, values_of
from qatkit.recipe.loading import list_recipes

RECIPES = Path(__file__).parents[2] / "recipes"
LOGS = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in sorted(RECIPES.glob("*/*.md"))]


def header_of(name: str) -> str:
    return " ".join(re.findall(r"^# (.*)$", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE))


def test_every_recipe_that_is_logged_ships_and_has_its_log() -> None:
    assert set(LOGGED) <= set(list_recipes())
    assert set(LOGGED) <= set(LOGS)


@pytest.mark.parametrize("name", LOGS)
def test_a_log_is_named_by_its_recipe_and_of_what_the_recipe_says_now(name: str) -> None:
    assert f"{name.rpartition('/')[2]}.md in this folder" in header_of(name)
    text = (RECIPES / f"{name}.md").read_text()
    if "recipe_logs.py" in text:
        assert text.endswith(f"; recipe {values_of(name)}.\n"), f"run python benchmarks/recipe_logs.py {name}"


def test_a_log_shows_the_report_the_way_there_and_what_it_was_made_with(tmp_path: Path) -> None:
    small = ["model.args.channels=[8,8]", "stages.dense.max_steps=30", "stages.ramp.max_steps=20"]
    report = finished("vision/digits_magnitude90", tmp_path / "run", small)
    text = log("vision/digits_magnitude90", report)
    table = (tmp_path / "run" / "report.md").read_text().splitlines()[2:6]
    assert text.splitlines()[4:8] == table
    for row in report["rows"]:
        assert f"- {row['stage']}: {row['verification']['text']}" in text
    assert re.search(
        r"^\| dense \| 19 of 30 \| \d+\.\d+% \|\n\| dense \| 30 of 30 \| \d+\.\d+% \|$", text, re.MULTILINE
    )
    assert re.search(r"^\| ramp \| 20 of 20 \|", text, re.MULTILINE)
    assert f"torch {report['versions']['torch']}" in text.splitlines()[-1]
