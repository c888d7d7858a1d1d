"""`qatkit sensitivity` and `qatkit allocate`: from a run's dense stage to a recipe that trains mixed formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatkit.pipeline.validation import validate_recipe
from qatkit.quantization.mixed.allocation import allocate, totals
from qatkit.quantization.mixed.overrides import allocated_layers
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.recipe.loading import load_recipe
from tests.cli.in_process import Done, qatkit

SMALL = ["stages.dense.max_steps=30", "model.args.channels=[8,8]"]
FORMATS = """\
int8: {weight: {num_bits: 8}, activation: {num_bits: 8, symmetric: false, strategy: tensor}}
int4: {weight: {num_bits: 4, observer: mse}}
W4A16: {scheme: W4A16}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "formats.yaml").write_text(FORMATS)
    done = qatkit("run", "vision/digits_int4", *SMALL, "--until", "dense", "--out", "run", cwd=folder)
    assert done.code == 0, done.err
    done = measure(folder)
    assert done.code == 0, done.err
    assert done.out.startswith("measured stage dense\n")
    return folder


def measure(folder: Path, *arguments: str) -> Done:
    formats = ["--candidates", "formats.yaml", "--batches", "2", "--out", "run"]
    return qatkit("sensitivity", "vision/digits_int4", *SMALL, *formats, *arguments, cwd=folder)


def test_what_was_measured_is_written_as_json_table_and_picture(folder: Path) -> None:
    found = Sensitivity.from_plain(json.loads((folder / "run" / "sensitivity.json").read_text()))
    assert [group.name for group in found.groups] == ["conv1", "conv2", "classifier"]
    assert [list(group.options) for group in found.groups] == [["int8", "int4"]] * 2 + [["int8", "int4", "W4A16"]]
    assert found.others == ()  # BatchNorm is folded before, as in training
    left_out = next(line for line in (folder / "run" / "sensitivity.md").read_text().splitlines() if "'conv1'" in line)
    assert left_out.startswith("- W4A16 is omitted: ")
    assert "<svg" in (folder / "run" / "sensitivity.svg").read_text()


def test_a_second_measurement_is_the_same_to_the_last_bit(folder: Path) -> None:
    again = measure(folder, "--json", "--stage", "dense")
    assert json.loads(again.out) == json.loads((folder / "run" / "sensitivity.json").read_text())


def test_the_printed_block_is_part_of_a_recipe_that_quantizes_exactly_so(folder: Path) -> None:
    done = qatkit("allocate", "run", "--average-bits", "5", cwd=folder)
    assert done.code == 0, done.err
    found = Sensitivity.from_plain(json.loads((folder / "run" / "sensitivity.json").read_text()))
    chosen = allocate(found, average_bits=5)
    size, increase = totals(found, chosen)
    assert done.out.startswith(f"# {size:,} bytes, {8 * size / found.weights:.3f} bits per weight including scales\n")
    block = "".join(f"      {line}\n" for line in done.out.splitlines())
    recipe = f"""\
name: mixed
model: {{factory: "qatkit.models:cnn", args: {{channels: [8, 8]}}}}
data: {{factory: "qatkit.data:digits"}}
stages:
  qat:
      max_steps: 5
{block}"""
    (folder / "mixed.yaml").write_text(recipe)
    loaded = load_recipe(folder / "mixed.yaml")
    quantize = loaded.stages["qat"].quantize
    assert quantize is not None
    assert quantize.arguments["layers"] == allocated_layers(found, chosen)
    assert validate_recipe(loaded)["qat"].quantized == ["conv1", "conv2", "classifier"]
    as_json = json.loads(qatkit("allocate", "run/sensitivity.json", "--bytes", str(size), "--json", cwd=folder).out)
    assert (as_json["bytes"], as_json["increase"]) == (size, increase)


def test_a_folder_without_the_dense_stage_is_measured_on_the_model_as_its_factory_makes_it(folder: Path) -> None:
    done = measure(folder, "--out", "fresh", "--include", "classifier")
    assert done.code == 0, done.err
    assert done.out.startswith("measured the untrained model\n")
    assert sorted(path.name for path in (folder / "fresh").iterdir()) == [
        "sensitivity.json",
        "sensitivity.md",
        "sensitivity.svg",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("allocate", "run", "--average-bits", "2"), "average_bits: 2.0 is too small: the smallest formats take"),
        (("allocate", "run"), "--average-bits or --bytes: exactly one of the two is required"),
        (("allocate", "nowhere", "--bytes", "9"), "the file does not exist; pass the --out folder"),
        (("allocate", "formats.yaml", "--bytes", "9"), "formats.yaml: the file is not valid JSON"),
        (("allocate", "run/stages/dense/stage.json", "--bytes", "9"), "not written by `qatkit sensitivity`"),
        (("sensitivity", "vision/digits_int4", "--out", "run"), "max_steps: was 30, is now 1000"),
        (("sensitivity", "vision/digits_int4", "--stage", "qat", "--out", "run"), "stage 'qat' of run is not finished"),
        (("sensitivity", "vision/digits_int4", "--stage", "end", "--out", "run"), "--stage: 'end' is not a stage"),
        (("sensitivity", "vision/digits_int4", "--candidates", "W4A17"), "scheme: unknown scheme 'W4A17'"),
        (("sensitivity", "vision/digits_int4", "--candidates", "none.yaml"), "the file 'none.yaml' does not exist"),
        (("sensitivity", "vision/digits_int4", "--candidates", "bad.yaml"), "candidates.int4.weight.bits: unknown key"),
        (("sensitivity", "vision/digits_int4", "--exclude", "norm9"), "exclude[0]: 'norm9' matches no layer"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "bad.yaml").write_text("int4: {weight: {bits: 4}}\n")
    done = qatkit(*arguments, cwd=folder)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (folder / "runs").exists()
