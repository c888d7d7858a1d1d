"""A recipe is loaded whole or refused with one sentence: the key, the value seen, what to write, and where."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatkit.errors import QatkitError
from qatkit.loading import flatten, list_recipes, load_recipe, recipe_text, recipe_to_yaml
from qatkit.recipe import FactoryConfig, Recipe, StageConfig
from qatkit.strict_yaml import dump_yaml, parse_yaml

GOOD = """\
name: tiny
seed: 7
model:
  factory: "qatkit.models:mlp"
  args: {hidden: [8, 8]}
data: {factory: "qatkit.data:digits"}
stages:
  dense: {max_steps: 10, lr: 1e-3}
  qat:
    max_steps: 5
    distill: {temperature: 4, alpha: 0.7}
    quantize:
      weight: {num_bits: 4, strategy: channel, observer: lsq}
      activation: {num_bits: 8, symmetric: false, strategy: tensor}
export: {format: onnx}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message a recipe is refused with; it must fit one screen."""
    with pytest.raises(QatkitError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert len(message) < 500
    return message


def assert_says(message: str, key: str, *parts: str) -> None:
    assert message.startswith(f"{key}: "), message
    for part in parts:
        assert part in message


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
        start = time.perf_counter()
        from qatkit.loading import load_recipe
        load_recipe(sys.argv[1])
        print(time.perf_counter() - start, *sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
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


# --- scalars and overrides


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


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, database=None)
@given(PLAIN)
def test_whatever_is_written_as_yaml_reads_back_equal(value: Any) -> None:
    assert repr(parse_yaml(dump_yaml({"value": value}), "test")) == repr({"value": value})


@pytest.mark.parametrize(
    "text", ["1e-3", "2:4", "yes", "0o7", "null", "", " a", "a: b", "# c", "2020-01-01", "<<", "~"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml([text]), "test") == [text]


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
    assert_says(message, key, "${", "a recipe runs nothing", "write the value itself, or ${key}")
    assert "leaked" not in message


def test_a_resolver_in_the_file_is_refused_as_well(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD.replace("hidden: [8, 8]", "hidden: ['${oc.env:HOME}']"))
    assert_says(refusal(recipe_file), "model.args.hidden[0]", "'${oc.env:HOME}'", "tiny.yaml")


def test_a_reference_put_together_from_parts_is_refused_not_evaluated(recipe_file: Path) -> None:
    message = refusal(
        recipe_file, "model.args.a=$", "model.args.b='{oc.env:HOME}'", "name='${model.args.a}${model.args.b}'"
    )
    assert_says(message, "name", "becomes '${oc.env:HOME}'")


@pytest.mark.parametrize(
    ("overrides", "key", "parts"),
    [
        (["stages.qat.lr=${stages.dens.lr}"], "stages.qat.lr", ["'${stages.dens.lr}'", "'stages.dense.lr'?"]),
        (["stages.qat.lr=${.lrr}"], "stages.qat.lr", ["'${.lrr}'", "names no key"]),
        (["seed=${seed}"], "seed", ["refers to itself"]),
        (["name=${stages.qat.schedule}", "stages.qat.schedule=${name}"], "name", ["refers to itself"]),
        (["model.args.x=${model}"], "model.args.x", ["'${model}'", "refers to itself"]),
        (["stages.qat.max_steps=${stages.dense.lr}"], "stages.qat.max_steps", ["0.001", "not a whole number"]),
        (["name=${seed}"], "name", ["7 is not text"]),
        (["stages.qat=${stages.dense.lr}"], "stages.qat", ["0.001 is not a block"]),
    ],
)
def test_a_reference_to_nothing_to_itself_or_to_the_wrong_type_is_refused(
    recipe_file: Path, overrides: list[str], key: str, parts: list[str]
) -> None:
    assert_says(refusal(recipe_file, *overrides), key, *parts)


# --- mistakes in keys and values, by override (so each is one line) and in the file


@pytest.mark.parametrize(
    ("override", "key", "parts"),
    [
        # unknown keys
        ("stagez.qat.lr=1", "stagez", ["unknown key", "did you mean 'stages'?"]),
        ("stages.qatt.lr=1", "stages.qatt", ["no such stage", "'qat'?"]),
        ("stages.qat.quantise.weight.num_bits=4", "stages.qat.quantise", ["'quantize'?"]),
        ("stages.qat.quantize.weight.bits=4", "stages.qat.quantize.weight.bits", ["'num_bits'?"]),
        ("model.arguments={}", "model.arguments", ["unknown key", "did you mean 'args'?"]),
        ("learning_rate=1", "learning_rate", ["unknown key", "write one of name, model, data, stages"]),
        ("Seed=1", "Seed", ["did you mean 'seed'?"]),
        # wrong types
        ("stages.qat.max_steps=ten", "stages.qat.max_steps", ["'ten' is not a whole number", "such as 8"]),
        ("stages.qat.max_steps=1e3", "stages.qat.max_steps", ["1000.0", "write 1000 "]),
        ("stages.qat.max_steps='5'", "stages.qat.max_steps", ["'5'", "write 5 "]),
        ("stages.qat.max_steps=true", "stages.qat.max_steps", ["true is not a whole number"]),
        ("stages.qat.max_steps=null", "stages.qat.max_steps", ["null is not a whole number"]),
        ("stages.qat.lr=true", "stages.qat.lr", ["true is not a number"]),
        ("stages.qat.lr=fast", "stages.qat.lr", ["'fast' is not a number"]),
        ("stages.qat.lr='0.1'", "stages.qat.lr", ["'0.1'", "write 0.1 without quotes"]),
        ("stages.qat.lr='nan'", "stages.qat.lr", ["'nan' is not a number"]),
        ("stages.qat.lr=.nan", "stages.qat.lr", ["nan is not a finite number"]),
        ("stages.qat.lr=.inf", "stages.qat.lr", ["inf is not a finite number"]),
        ("stages.qat.lr=1e999", "stages.qat.lr", ["inf is not a finite number"]),
        (f"stages.qat.lr={'9' * 400}", "stages.qat.lr", ["is not a finite number"]),
        ("model.args.x=[-.inf]", "model.args.x[0]", ["-inf is not a finite number"]),
        ("name=7", "name", ['7 is not text; write "7" in quotes']),
        ("stages.qat.quantize.weight.symmetric=yes", "stages.qat.quantize.weight.symmetric", ["write true or false"]),
        ("stages.qat.quantize.weight.symmetric=1", "stages.qat.quantize.weight.symmetric", ["1 is not true or false"]),
        ("stages.qat.quantize.weight.strategy=chanel", "stages.qat.quantize.weight.strategy", ["'channel'?"]),
        ("stages.qat.quantize.include=fc", "stages.qat.quantize.include", ["'fc' is not a list", "write [fc]"]),
        ("stages.qat.quantize.include=[1]", "stages.qat.quantize.include[0]", ["1 is not text"]),
        ("stages.qat.quantize.weight=4", "stages.qat.quantize.weight", ["4 is not a block", "weight: {"]),
        ("stages=[1]", "stages", ["[1] is not a block of keys"]),
        ("model.args.1={2: 3}", "model.args.1.2", ["the key 2 is not text"]),
        ("trainer.devices=1.5", "trainer.devices", ["1.5 is not a whole number or text"]),
        ("trainer.devices=true", "trainer.devices", ["true is not a whole number or text"]),
        # missing values
        ("name=???", "name", ["is missing"]),
        ("stages.dense={}", "stages.dense.max_steps", ["is missing"]),
        ("model={}", "model.factory", ["is missing"]),
        ("export={}", "export.format", ["is missing"]),
        # out of range, wherever the object is
        ("stages.qat.quantize.weight.num_bits=9", "stages.qat.quantize.weight.num_bits", ["9 is out", "2 to 8"]),
        ("stages.qat.quantize.activation.num_bits=1", "stages.qat.quantize.activation.num_bits", ["1 is out"]),
        ("stages.qat.quantize={}", "stages.qat.quantize.weight", ["neither weight nor activation"]),
        ("stages.qat.quantize.weight.strategy=token", "stages.qat.quantize.weight.observer", ["'lsq'", "minmax"]),
        ("stages.qat.distill.alpha=2", "stages.qat.distill.alpha", ["2.0 is out of range", "0 to 1"]),
        ("stages.qat.distill.teacher=qat", "stages.qat.distill.teacher", ["'qat' is no earlier stage"]),
        ("stages.qat.lr=0", "stages.qat.lr", ["0.0 is out of range"]),
        ("stages.dense.batch_size=0", "stages.dense.batch_size", ["0 is out of range"]),
        ("trainer.devices=0", "trainer.devices", ["0 is out of range"]),
        ("stages={}", "stages", ["has no stage"]),
        # names that become folders
        ("stages.a/b={max_steps: 1}", "stages.a/b", ["'a/b' is no plain name"]),
        ("stages={..: {max_steps: 1}}", "stages...", ["'..' is no plain name"]),
        ("stages={a b: {max_steps: 1}}", "stages.a b", ["'a b' is no plain name"]),
        ("stages={a.b: {max_steps: 1}}", "stages.a.b", ["'a.b' is no plain name"]),
        ("name=../up", "name", ["'../up' is no plain name"]),
        # overrides into what is no block
        ("seed.x=3", "seed", ["7 has no keys", "seed=..."]),
        ("model.args.hidden.0=3", "model.args.hidden", ["[8, 8] has no keys", "model.args.hidden=..."]),
        ("seed={a: 1, a: 2}", "seed.a", ["given twice"]),
        ("export={format: }", "export.format", ["has no value", "null for none"]),
    ],
)
def test_a_mistake_names_its_key_the_value_and_the_fix(
    recipe_file: Path, override: str, key: str, parts: list[str]
) -> None:
    message = refusal(recipe_file, override)
    assert_says(message, key, *parts)
    assert f"override '{override[:97]}" in message


@pytest.mark.parametrize("override", ["stages.qat.lr", "seed=", "=3", ".seed=3", "stages..lr=3", ""])
def test_an_override_that_is_not_key_and_value_is_refused(recipe_file: Path, override: str) -> None:
    assert f"override '{override}': is not key=value; write it as" in refusal(recipe_file, override)


@pytest.mark.parametrize("override", ["seed=[1", "stages.qat.quantize.include=[*.fc]", "seed=!!int a", "seed=!!bool a"])
def test_an_override_whose_value_is_no_yaml_is_refused(recipe_file: Path, override: str) -> None:
    assert f"override '{override}'" in (message := refusal(recipe_file, override))
    assert "not valid YAML" in message


@pytest.mark.parametrize(
    ("old", "new", "key", "parts"),
    [
        ("seed: 7", "sede: 7", "sede", ["did you mean 'seed'?"]),
        ("max_steps: 5\n", "lr: 0.1\n", "stages.qat.max_steps", ["is missing"]),
        ("num_bits: 4", "num_bits: 9", "stages.qat.quantize.weight.num_bits", ["9 is out of range"]),
        ("seed: 7", "seed: 7\nseed: 8", "seed", ["given twice, first in line 2", "line 3", "remove one"]),
        ("    max_steps: 5", "    max_steps: 5\n    max_steps: 6", "stages.qat.max_steps", ["line 10", "line 11"]),
        ("distill: {temperature: 4, alpha: 0.7}", "distill:", "stages.qat.distill", ["no value", "line 11", "{}"]),
        ("seed: 7", "seed: 7\n1: 2", "1", ["the key 1 is not text"]),
        ("seed: 7", "seed: 7\n[a]: 2", "recipe", ["a key is no text", "line 3"]),
    ],
)
def test_a_mistake_in_the_file_names_the_file(
    recipe_file: Path, old: str, new: str, key: str, parts: list[str]
) -> None:
    assert old in GOOD
    recipe_file.write_text(GOOD.replace(old, new, 1))
    message = refusal(recipe_file)
    assert_says(message, key, *parts)
    assert str(recipe_file) in message


# --- files that are no recipes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is empty", "write name, model, data and stages"]),
        (b"# only a comment\n", ["is empty"]),
        (b"- 1\n- 2\n", ["[1, 2] is no recipe"]),
        (b"just text", ["'just text' is no recipe"]),
        (b"name: [1\nseed: 2", ["line 2", "not valid YAML"]),
        (b"name: a\n\tseed: 2", ["line 2", "not valid YAML"]),
        (b"name: a\n---\nname: b", ["line 2", "not valid YAML"]),
        (b"name: !!python/object/apply:os.system ['true']", ["line 1", "python/object/apply"]),
        (b"name: \x07", ["not valid YAML"]),
        (b"\xff\xfe\x00", ["is not UTF-8 text"]),
        (b"[" * 5000, ["nested too deeply"]),
        (b"seed: " + b"9" * 5000, ["not valid YAML"]),
        (b"a: &a [1, *a]", ["a[1]", "the alias stands for a block that holds it"]),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
            b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]",
            ["more than 10000 values"],
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe_file: Path, content: bytes, parts: list[str]) -> None:
    recipe_file.write_bytes(content)
    message = refusal(recipe_file)
    assert str(recipe_file) in message
    for part in parts:
        assert part in message


def test_an_unknown_name_is_refused_with_the_nearest_recipe() -> None:
    with pytest.raises(QatkitError, match=r"'vision/digit_int4': no such file .* 'vision/digits_int4'\?"):
        load_recipe("vision/digit_int4")


def test_a_folder_or_an_impossible_path_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "cannot be read" in refusal(Path("a" * 300))
    assert "cannot be read" in refusal(Path("a\0b"))


def test_a_byte_order_mark_does_no_harm(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD, "utf-8-sig")
    assert load_recipe(recipe_file).name == "tiny"


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


def test_a_recipe_made_in_python_is_checked_like_one_from_a_file() -> None:
    factory = FactoryConfig("qatkit.models:mlp")
    with pytest.raises(ValueError, match=r"stages\.\.\./x: '\.\./x' is no plain name"):
        Recipe(name="a", model=factory, data=factory, stages={"../x": StageConfig(max_steps=1)})
