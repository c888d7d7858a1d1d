"""A bad recipe is refused with one sentence: the key, the value seen, what to write, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig, Recipe, StageConfig
from qatkit.recipe.loading import load_recipe
from tests.support.recipes import GOOD, assert_says, refusal


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD)
    return path


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
        ("learning_rate=1", "learning_rate", ["unknown key", "use one of schema_version, name, model, data, stages"]),
        ("Seed=1", "Seed", ["did you mean 'seed'?"]),
        # wrong types
        ("stages.qat.max_steps=ten", "stages.qat.max_steps", ["'ten' is not an integer", "such as 8"]),
        ("stages.qat.max_steps=1e3", "stages.qat.max_steps", ["1000.0", "use 1000 "]),
        ("stages.qat.max_steps='5'", "stages.qat.max_steps", ["'5'", "use 5 "]),
        ("stages.qat.max_steps=true", "stages.qat.max_steps", ["true is not an integer"]),
        ("stages.qat.max_steps=null", "stages.qat.max_steps", ["null is not an integer"]),
        ("stages.qat.lr=true", "stages.qat.lr", ["true is not a number"]),
        ("stages.qat.lr=fast", "stages.qat.lr", ["'fast' is not a number"]),
        ("stages.qat.lr='0.1'", "stages.qat.lr", ["'0.1'", "use 0.1 without quotes"]),
        ("stages.qat.lr='nan'", "stages.qat.lr", ["'nan' is not a number"]),
        ("stages.qat.lr=.nan", "stages.qat.lr", ["nan is not a finite number"]),
        ("stages.qat.lr=.inf", "stages.qat.lr", ["inf is not a finite number"]),
        ("stages.qat.lr=1e999", "stages.qat.lr", ["inf is not a finite number"]),
        (f"stages.qat.lr={'9' * 400}", "stages.qat.lr", ["is not a finite number"]),
        ("model.args.x=[-.inf]", "model.args.x[0]", ["-inf is not a finite number"]),
        ("name=7", "name", ['7 is not text; use "7" in quotes']),
        ("stages.qat.quantize.weight.symmetric=yes", "stages.qat.quantize.weight.symmetric", ["use true or false"]),
        ("stages.qat.quantize.weight.symmetric=1", "stages.qat.quantize.weight.symmetric", ["1 is not true or false"]),
        ("stages.qat.quantize.weight.strategy=chanel", "stages.qat.quantize.weight.strategy", ["'channel'?"]),
        ("stages.qat.quantize.include=fc", "stages.qat.quantize.include", ["'fc' is not a list", "use [fc]"]),
        ("stages.qat.quantize.include=[1]", "stages.qat.quantize.include[0]", ["1 is not text"]),
        ("stages.qat.quantize.weight=4", "stages.qat.quantize.weight", ["4 is not a block", "weight: {"]),
        ("stages=[1]", "stages", ["[1] is not a block of keys"]),
        ("model.args.1={2: 3}", "model.args.1.2", ["the key 2 is not text"]),
        ("trainer.devices=1.5", "trainer.devices", ["1.5 is not an integer or text"]),
        ("trainer.devices=true", "trainer.devices", ["true is not an integer or text"]),
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
        ("stages.qat.distill.teacher=qat", "stages.qat.distill.teacher", ["'qat' is not an earlier stage"]),
        ("stages.qat.lr=0", "stages.qat.lr", ["0.0 is out of range"]),
        ("stages.dense.batch_size=0", "stages.dense.batch_size", ["0 is out of range"]),
        ("trainer.devices=0", "trainer.devices", ["0 is out of range"]),
        ("stages={}", "stages", ["has no stage"]),
        # names that become folders
        ("stages.a/b={max_steps: 1}", "stages.a/b", ["'a/b' is not a valid name"]),
        ("stages={..: {max_steps: 1}}", "stages...", ["'..' is not a valid name"]),
        ("stages={a b: {max_steps: 1}}", "stages.a b", ["'a b' is not a valid name"]),
        ("stages={a.b: {max_steps: 1}}", "stages.a.b", ["'a.b' is not a valid name"]),
        ("name=../up", "name", ["'../up' is not a valid name"]),
        # overrides inside a scalar
        ("seed.x=3", "seed", ["7 has no keys", "seed=..."]),
        ("model.args.hidden.0=3", "model.args.hidden", ["[8, 8] has no keys", "model.args.hidden=..."]),
        ("seed={a: 1, a: 2}", "seed.a", ["duplicates the key on line 1"]),
        # renamed, or of another version
        ("stages.dense.lottery={rounds: 1, share: 0.2}", "stages.dense.lottery.share", ["renamed; use 'fraction'"]),
        ("schema_version=2", "schema_version", ["written for schema 2, but this qatkit reads 1", "port the recipe"]),
        ("schema_version=true", "schema_version", ["written for schema True"]),
        ("export={format: }", "export.format", ["has no value", "null for none"]),
        ("export={format: dense, python: p}", "export.python", ["'dense' files run in the environment of qatkit"]),
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
    assert f"override '{override}': is not key=value; use the form" in refusal(recipe_file, override)


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
        ("seed: 7", "seed: 7\nseed: 8", "seed", ["duplicates the key on line 2; remove one of the two keys", "line 3"]),
        ("    max_steps: 5", "    max_steps: 5\n    max_steps: 6", "stages.qat.max_steps", ["line 10", "line 11"]),
        ("distill: {temperature: 4, alpha: 0.7}", "distill:", "stages.qat.distill", ["no value", "line 11", "{}"]),
        ("seed: 7", "seed: 7\n1: 2", "1", ["the key 1 is not text"]),
        ("seed: 7", "seed: 7\n[a]: 2", "recipe", ["a key is not text", "line 3"]),
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


# --- files that are not recipes


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is empty; add name, model, data and stages"]),
        (b"# only a comment\n", ["is empty"]),
        (b"- 1\n- 2\n", ["[1, 2] is not a recipe"]),
        (b"just text", ["'just text' is not a recipe"]),
        (b"name: [1\nseed: 2", ["line 2", "not valid YAML"]),
        (b"name: a\n\tseed: 2", ["line 2", "not valid YAML"]),
        (b"name: a\n---\nname: b", ["line 2", "not valid YAML"]),
        (b"name: !!python/object/apply:os.system ['true']", ["line 1", "python/object/apply"]),
        (b"name: \x07", ["not valid YAML"]),
        (b"\xff\xfe\x00", ["is not UTF-8 text"]),
        (b"[" * 5000, ["nested too deeply"]),
        (b"seed: " + b"9" * 5000, ["not valid YAML"]),
        (b"a: &a [1, *a]", ["a[1]", "the alias refers to a block that contains it"]),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
            b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]",
            ["more than 10000 values"],
        ),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(recipe_file: Path, content: bytes, parts: list[str]) -> None:
    recipe_file.write_bytes(content)
    message = refusal(recipe_file)
    assert str(recipe_file) in message
    for part in parts:
        assert part in message


def test_an_unknown_name_is_refused_with_the_nearest_recipe() -> None:
    with pytest.raises(QatkitError, match=r"'vision/digit_int4': no file and no built-in.* 'vision/digits_int4'\?"):
        load_recipe("vision/digit_int4")


@pytest.mark.parametrize("key", ["stages.qat.start", "export.format", "stages.qat.optimizer"])
def test_a_value_of_thousands_of_characters_is_shortened(recipe_file: Path, key: str) -> None:
    message = refusal(recipe_file, f"{key}={'a' * 5000}")
    assert f"{'a' * 40}" in message


def test_a_folder_or_an_impossible_path_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "cannot be read" in refusal(Path("a" * 300))
    assert "cannot be read" in refusal(Path("a\0b"))


def test_a_byte_order_mark_does_no_harm(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD, "utf-8-sig")
    assert load_recipe(recipe_file).name == "tiny"


def test_a_recipe_made_in_python_is_checked_like_one_from_a_file() -> None:
    factory = FactoryConfig("qatkit.models:mlp")
    with pytest.raises(ValueError, match=r"stages\.\.\./x: '\.\./x' is not a valid name"):
        Recipe(name="a", model=factory, data=factory, stages={"../x": StageConfig(max_steps=1)})
