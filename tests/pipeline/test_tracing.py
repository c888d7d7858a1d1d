"""`qatkit profile --trace`: the training of a stage in torch.profiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatkit.pipeline.tracing import TRACED, trace
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit

pytestmark = pytest.mark.medium
RECIPE = """\
name: traced
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 20, batch_size: 32}
  qat: {max_steps: 20, batch_size: 32, distill: {}, quantize: {weight: {num_bits: 4}, activation: {strategy: tensor}}}
export: {format: dense}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "traced.yaml"
    path.write_text(RECIPE)
    return path


def test_a_quantized_stage_is_traced_with_its_fake_quantizers(recipe: Path, tmp_path: Path) -> None:
    """The earlier stage is not trained, and no folder is left."""
    done = qatkit("profile", "traced.yaml", "--device", "a100", "--trace", "qat.json", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)["trace"]
    assert (found["what"], found["stage"], found["device"], found["steps"]) == ("training step", "qat", "cpu", TRACED)
    calls = {each["name"]: each["calls"] for each in found["operators"]}
    assert calls["aten::addmm"] == 2 * 2, "two layers of the student and of the teacher"
    assert 0 < found["fake_quantization"] < found["busy"]
    assert sum(each["seconds"] for each in found["operators"]) == pytest.approx(found["busy"], rel=0.2)
    events = json.loads((tmp_path / "qat.json").read_text())["traceEvents"]
    marked = [each for each in events if each.get("name") == "fake quantization" and each.get("ph") == "X"]
    # of two layers: the input, the scale of the weight and the weight, which the second one needs again for its input
    assert len(marked) == 7 * TRACED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qat.json", "traced.yaml"]


def test_a_stage_is_chosen_by_name_and_has_no_fake_quantizers(recipe: Path, tmp_path: Path) -> None:
    done = qatkit(
        "profile", "traced.yaml", "--device", "a100", "--trace", "dense.json.gz", "--stage", "dense", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "training step of stage 'dense' on cpu" in done.out
    assert "fake quantization, forward and backward: 0 ms per step, 0.0% of the operators' time" in done.out
    assert (tmp_path / "dense.json.gz").stat().st_size > 0


def test_forward_passes_are_traced_if_no_stage_trains(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("max_steps: 20", "max_steps: 0"))
    changed = load_recipe(recipe)
    found = trace(Run(changed, tmp_path), tmp_path / "forward.json")
    assert (found.what, found.stage) == ("forward pass", None)
    assert {each.name: each.calls for each in found.operators}["aten::addmm"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", "qat"), "--stage: this option has no effect without --trace"),
        (("--trace", "qat.txt"), "--trace: 'qat.txt' has another ending; use .json or .json.gz"),
        (("--trace", "qat.json", "--stage", "qta"), "--stage: 'qta' is not a stage; did you mean 'qat'?"),
        (("--trace", "qat.json", "stages.dense.max_steps=0", "--stage", "dense"), "--stage: 'dense' does not train"),
        (
            ("--trace", "qat.json", "stages.qat.max_steps=3"),
            "a trace needs 7 steps that nothing stops",
        ),
        (
            ("--trace", "qat.json", "stages.qat.distill.cache={folder: c}"),
            "a trace does not read cached teacher outputs",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused(
    arguments: tuple[str, ...], message: str, recipe: Path, tmp_path: Path
) -> None:
    done = qatkit("profile", "traced.yaml", "--device", "a100", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "qat.json").exists()


def test_a_config_has_no_data_for_a_trace(tmp_path: Path) -> None:
    done = qatkit("profile", ".", "--device", "a100", "--trace", "qat.json", cwd=tmp_path)
    assert (done.code, "--trace: a config has no data to train on" in done.err) == (2, True)
