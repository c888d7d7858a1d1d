"""A recipe is loaded whole: typed, complete, its references replaced, and nothing evaluated on the way."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from qatkit.recipe import FactoryConfig, StageConfig
from qatkit.recipe.loading import flatten, list_recipes, load_recipe, recipe_text, recipe_to_yaml
from tests.support.recipes import GOOD, assert_says, refusal


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD)
    return path


# --- what a good recipe becomes


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert "# Command: qatkit run " + name in recipe_text(name)
    (tmp_path / "copy.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_the_shipped_recipes_are_listed_by_folder_and_name() -> None:
    assert "vision/digits_int4" in list_recipes()


def test_a_recipe_is_typed_complete_and_in_the_order_of_the_file(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert list(recipe.stages) == ["dense", "qat"]
    assert recipe.stages["dense"] == StageConfig(max_steps=10, lr=1e-3)
    quantize = recipe.stages["qat"].quantize
    assert quantize is not None
    assert quantize.weight is not None
    assert (quantize.weight.num_bits, quantize.include) == (4, ["*"])
    distill = recipe.stages["qat"].distill
    assert distill is not None
    assert type(distill.temperature) is float


def test_a_recipe_holds_nothing_but_plain_python(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["model.args.deep={a: [1, {b: '${seed}'}]}"])
    assert recipe.model.args["deep"] == {"a": [1, {"b": 7}]}

    def types(value: Any) -> set[type]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return {type(value)}.union(*map(types, inner))

    assert types(dataclasses.asdict(recipe)) <= {dict, list, str, int, float, bool, type(None)}


def test_the_schema_check_imports_nothing_heavy_and_takes_well_under_a_second(recipe_file: Path) -> None:
    script = """
        import sys, time
        start = time.process_time()
        from qatkit.recipe.loading import load_recipe
        load_recipe(sys.argv[1])
        print(time.process_time() - start, *sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(recipe_file)]
    seconds, *heavy = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert heavy == []
    assert float(seconds) < 1


def test_an_alias_is_a_value_of_its_own_so_an_override_changes_one_stage_only(recipe_file: Path) -> None:
    text = GOOD.replace("dense: {max_steps: 10, lr: 1e-3}", "dense: &d {max_steps: 10, lr: 1e-3}\n  more: *d")
    recipe_file.write_text(text)
    recipe = load_recipe(recipe_file, ["stages.more.max_steps=3"])
    assert (recipe.stages["dense"].max_steps, recipe.stages["more"].max_steps) == (10, 3)


# --- overrides


def test_overrides_replace_what_the_file_says_and_the_last_one_wins(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["stages.qat.lr=1e-5", "stages.qat.lr=2e-5", "stages.qat.distill=null", "model.args.hidden=[4]"]
    )
    assert recipe.stages["qat"].lr == 2e-5
    assert recipe.stages["qat"].distill is None
    assert recipe.model.args == {"hidden": [4]}


def test_an_override_turns_a_block_on_and_adds_a_whole_stage(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.dense.distill.alpha=0.2", "stages.last={max_steps: 1}"])
    assert recipe.stages["dense"].distill is not None
    assert recipe.stages["dense"].distill.alpha == 0.2
    assert list(recipe.stages) == ["dense", "qat", "last"]


# --- references


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("stages.qat.max_steps=${stages.dense.max_steps}", "stages.qat.max_steps", 10),
        ("stages.qat.max_steps=${.batch_size}", "stages.qat.max_steps", 64),  # a default, not in the file
        ("name=run_${seed}", "name", "run_7"),
        ("model.args.x=[['${seed}']]", "model.args.x", "[[7]]"),
        ("model.args.x=${model.args.hidden}", "model.args.x", "[8, 8]"),
        ("stages.dense.quantize=${stages.qat.quantize}", "stages.dense.quantize.weight.num_bits", 4),
    ],
)
def test_a_reference_becomes_the_value_it_names(recipe_file: Path, override: str, key: str, value: Any) -> None:
    assert flatten(load_recipe(recipe_file, [override]))[key] == value


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("name=${oc.env:QATKIT_SECRET}", "name"),
        ("name=a${oc.env:QATKIT_SECRET}b", "name"),
        ("name='${ oc.env : QATKIT_SECRET }'", "name"),
        (r"name=\${oc.env:QATKIT_SECRET}", "name"),
        (r"name=\\${oc.env:QATKIT_SECRET}", "name"),
        ("name='${oc.env:${seed}}'", "name"),
        ("name='${stages.${name}}'", "name"),
        ("name='$${oc.env:QATKIT_SECRET}'", "name"),
        ("model.args.x=[{y: '${oc.env:QATKIT_SECRET}'}]", "model.args.x[0].y"),
        ("model={factory: 'a:b', args: {x: '${oc.decode:1}'}}", "model.args.x"),
        (r"name=\${seed}", "name"),
        ("name='${seed'", "name"),
    ],
)
def test_no_resolver_is_ever_called(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("QATKIT_SECRET", "leaked")
    message = refusal(recipe_file, override)
    assert_says(message, key, "${", "recipes cannot run code", "use the value itself, or ${key}")
    assert "leaked" not in message


def test_a_resolver_in_the_file_is_refused_as_well(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD.replace("hidden: [8, 8]", "hidden: ['${oc.env:HOME}']"))
    assert_says(refusal(recipe_file), "model.args.hidden[0]", "'${oc.env:HOME}'", "tiny.yaml")


def test_a_reference_put_together_from_parts_is_refused_not_evaluated(recipe_file: Path) -> None:
    message = refusal(
        recipe_file, "model.args.a=$", "model.args.b='{oc.env:HOME}'", "name='${model.args.a}${model.args.b}'"
    )
    assert_says(message, "name", "resolves to '${oc.env:HOME}'")


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [
        (["stages.qat.lr=${stages.dens.lr}"], "stages.qat.lr", ["'${stages.dens.lr}'", "'stages.dense.lr'?"]),
        (["stages.qat.lr=${.lrr}"], "stages.qat.lr", ["'${.lrr}'", "refers to an unknown key"]),
        (["seed=${seed}"], "seed", ["refers to itself"]),
        (["name=${stages.qat.schedule}", "stages.qat.schedule=${name}"], "name", ["refers to itself"]),
        (["model.args.x=${model}"], "model.args.x", ["'${model}'", "refers to itself"]),
        (["stages.qat.max_steps=${stages.dense.lr}"], "stages.qat.max_steps", ["0.001", "not an integer"]),
        (["name=${seed}"], "name", ["7 is not text"]),
        (["stages.qat=${stages.dense.lr}"], "stages.qat", ["0.001 is not a block"]),
    ],
)
def test_a_reference_to_nothing_to_itself_or_to_the_wrong_type_is_refused(
    recipe_file: Path, overrides: list[str], key: str, parts: list[str]
) -> None:
    assert_says(refusal(recipe_file, *overrides), key, *parts)


# --- flat keys


def test_flat_keys_tell_apart_what_differs() -> None:
    one = flatten(FactoryConfig("a:b", {"x": [1, 2], "deep": {"y": None}, "empty": {}}), "model.")
    assert one == {
        "model.factory": "a:b",
        "model.args.x": "[1, 2]",
        "model.args.deep.y": None,
        "model.args.empty": "{}",
    }


def test_every_value_of_a_recipe_has_a_flat_key(recipe_file: Path) -> None:
    flat = flatten(load_recipe(recipe_file))
    assert flat["stages.qat.quantize.weight.num_bits"] == 4
    assert flat["stages.dense.quantize"] is None
    assert all(isinstance(v, str | int | float | None) for v in flat.values())
    assert all(math.isfinite(v) for v in flat.values() if isinstance(v, float))
