"""Pruning in recipes: later stages keep the zeros, the record counts them, and exports have code 0 for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qatkit import QatkitError
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.prepare import qat_layers
from qatkit.recipe.loading import load_recipe
from qatkit.report.page import write_page
from qatkit.run.folder import Run
from qatkit.run.record import write_record
from tests.support.matrix import representatives

RECIPE = """
name: pruned
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [32], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 60, lr: 3.0e-3}
  prune: {max_steps: 40, prune: {nm: [2, 4]}, distill: {alpha: 0.5}}
  ptq: {max_steps: 0, quantize: {weight: {num_bits: 4}}}
  qat: {max_steps: 30, distill: {alpha: 0.9}, quantize: {weight: {num_bits: 4, observer: lsq}}}
export: {format: dense}
"""


def run_of(folder: Path, *overrides: str) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "pruned.yaml").write_text(RECIPE)
    return Run(load_recipe(str(folder / "pruned.yaml"), list(overrides)), folder / "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("pruned"))
    run_stages(run)
    return run


def test_two_of_four_zeros_survive_distillation_and_int4_training_and_ship_as_code_zero(done: Run) -> None:
    pruned = done.load_model("prune", quantizers=False)
    final = done.load_model("qat")
    for name, layer in qat_layers(final):
        before = pruned.get_submodule(name).weight
        assert isinstance(before, torch.Tensor)
        groups = (before != 0).view(before.shape[0], -1, 4).sum(-1)
        assert (groups == 2).all()
        assert layer.weight_fake_quant is not None
        codes = quantize(layer.weight, *layer.weight_fake_quant.qparams(layer.weight), layer.weight_fake_quant.spec)
        assert not codes[before == 0].any()
        assert not torch.equal(layer.weight, before), "the rest was trained"
    export_run(done)
    assert verify_run(done)["qat"].passed
    shipped = load_file(done.out / "export" / "qat" / "dense" / "model.safetensors")
    for name, _ in qat_layers(final):
        assert not shipped[f"{name}.weight"][pruned.get_submodule(name).weight == 0].any()  # type: ignore[index, operator]


@pytest.mark.parametrize(
    "again",
    representatives(
        [
            "{sparsity: 0.3, include: ['3']}",
            "{sparsity: 0.3, layers: {'1': 0.0}}",
            "{sparsity: 0.6}",
            "{ramp: {final: 0.6, start: 0.5, end: 0.9}}",
            "{ramp: {final: 0.6, start: 0.5, end: 0.9}, include: ['3']}",
            "{ramp: {final: 0.6, start: 0.2, end: 0.9}, method: movement}",
            "{nm: [1, 4], method: wanda}",
            "{sparsity: 0.7, method: sparsegpt}",
            "{sparsity: 0.3, method: taylor}",
            "{nm: [2, 4], method: srste, include: ['3']}",
        ],
        {2, 5, 9},
    ),
)
def test_zeros_of_a_stage_stay_when_a_later_one_prunes_more_or_elsewhere(again: str, done: Run, tmp_path: Path) -> None:
    stages = RECIPE[: RECIPE.index("  ptq:")] + f"  more: {{max_steps: 12, lr: 1.0e-2, prune: {again}}}\n"
    if "srste" in again:  # the one method that recomputes its masks
        stages = stages.replace("prune: {nm: [2, 4]}", "prune: {nm: [2, 4], include: ['1']}")
    (tmp_path / "more.yaml").write_text(stages + "export: {format: dense}\n")
    run = Run(load_recipe(str(tmp_path / "more.yaml")), tmp_path / "run")
    run_stages(run)
    first, more = (load_file(run.folder(stage) / "model" / "model.safetensors") for stage in ("prune", "more"))
    for name in run.record("prune").zeros:
        assert not more[f"{name}.weight"][first[f"{name}.weight"] == 0].any()
        assert not torch.equal(more[f"{name}.weight"], first[f"{name}.weight"]), "the rest was trained"
    assert set(run.record("more").zeros) == {"1", "3"}


@pytest.mark.parametrize("layer", ["1", "3"])
def test_a_layer_without_zeros_is_not_masked(layer: str, tmp_path: Path) -> None:
    stages = RECIPE[: RECIPE.index("  prune:")] + (
        "  first: {max_steps: 4, prune: {sparsity: 0.0005, scope: model}}\n"
        f"  second: {{max_steps: 4, prune: {{sparsity: 0.5, include: ['{layer}']}}}}\nexport: {{format: dense}}\n"
    )
    (tmp_path / "few.yaml").write_text(stages)
    run = Run(load_recipe(str(tmp_path / "few.yaml")), tmp_path / "run")
    run_stages(run)
    assert sorted(run.record("first").zeros.values()) == [0, 1]
    assert run.record("second").zeros[layer] == {"1": 1024, "3": 160}[layer]
    assert 0 not in run.record("second").zeros.values()


def test_the_record_counts_the_zeros_of_the_saved_weights_of_every_stage(done: Run) -> None:
    assert done.record("dense").zeros == {}
    for stage in ("prune", "ptq", "qat"):
        weights = load_file(done.folder(stage) / "model" / "model.safetensors")
        zeros = done.record(stage).zeros
        assert zeros == {name: int((weights[f"{name}.weight"] == 0).sum()) for name in zeros}
        assert len(zeros) == 2


def test_the_report_states_the_zeros_of_every_layer_and_of_all_together(done: Run, tmp_path: Path) -> None:
    export_run(done)
    verify_run(done)
    rows = {row["stage"]: row["zeros"] for row in report_run(done)["rows"]}
    assert rows["dense"] == {}
    weights = load_file(done.folder("qat") / "model" / "model.safetensors")
    assert list(rows["qat"]) == ["1", "3"]
    for layer, counts in rows["qat"].items():
        weight = weights[f"{layer}.weight"]
        assert counts == [int((weight == 0).sum()), weight.numel()]
    page = (done.out / "report.md").read_text()
    assert "| layer | prune | ptq | qat |" in page
    assert "| all 2 layers | 50.00% | 50.00% | 50.00% |" in page
    assert "| 3 | 50.00% | 50.00% | 50.00% |" in page
    write_page([done.out], tmp_path / "page.html")
    assert "<h2>Sparsity</h2>" in (tmp_path / "page.html").read_text()


def test_a_record_of_other_zeros_than_its_file_has_is_refused(done: Run) -> None:
    record = done.record("prune")
    name, zeros = next(iter(record.zeros.items()))
    write_record(done.folder("prune"), replace(record, zeros=record.zeros | {name: 0}))
    try:
        with pytest.raises(QatkitError, match=f"layer '{name}' .* has {zeros} zeros, but 0 were recorded"):
            done.load_model("prune")
    finally:
        write_record(done.folder("prune"), record)


def test_zeros_may_grow_again_where_the_recipe_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path, "stages.qat.hold_sparsity=false", "stages.dense.max_steps=5", "stages.prune.max_steps=2")
    run_stages(run)
    assert run.record("qat").zeros == {}
    name = next(iter(run.record("prune").zeros))
    assert (run.load_model("qat", quantizers=False).get_submodule(name).weight == 0).float().mean() < 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.prune.prune.nm=[4, 2]",
            r"stages\.prune\.prune\.nm: \[4, 2\] is not a pair N, M with 0 < N < M; use a pair such as \[2, 4\]",
        ),
        (
            "stages.prune.prune.sparsity=0.5",
            r"stages\.prune\.prune\.sparsity: method magnitude needs exactly one of .*, got sparsity and nm",
        ),
        ("stages.prune.prune.include=[hed]", r"stages\.prune\.prune\.include\[0\]: 'hed' matches no linear"),
        ("stages.prune.prune.nm=[2, 7]", r"stages\.prune\.prune: groups of 7 do not divide the inputs of layer '1'"),
        (
            "stages.prune.prune={sparsity: 0.5, block: [3, 3]}",
            r"stages\.prune\.prune: blocks of 3 x 3 do not divide the weight of layer '1'",
        ),
        (
            "stages.prune.prune.nm=null",
            r"stages\.prune\.prune\.sparsity: method magnitude needs exactly one of sparsity, ramp, nm, got none",
        ),
        ("stages.prune.prune={sparsity: 1.0}", r"prune\.sparsity: 1\.0 is out of range"),
        ("stages.prune.prune={nm: 2:4}", r"prune\.nm: '2:4' is not a list; use \[2, 4\]"),
        ("stages.prune.prune={sparsity: 0.9999}", r"stages\.prune\.prune: layer '1' would keep 0 of its"),
        (
            "stages.prune.prune={sparsity: 0.5, layers: {'3': 0.9999}}",
            r"stages\.prune\.prune: layer '3' would keep",
        ),
        (
            "stages.prune.prune={sparsity: 0.5, layers: {'*': 0.0}}",
            r"stages\.prune\.prune\.layers: {'\*': 0.0} leaves no layer",
        ),
        (
            "stages.prune.prune={sparsity: 0.5, calibration_batches: 4}",
            r"prune\.calibration_batches: 4 has no effect, .* only wanda, sparsegpt, taylor do; remove",
        ),
        ("stages.prune.prune={sparsity: -0.5}", r"prune\.sparsity: -0\.5 is out of range"),
        ("stages.prune.prune={ramp: {final: 1.5}}", r"prune\.ramp\.final: 1\.5 is out of range"),
        ("stages.prune.prune={ramp: {final: 0.5, start: 0.6}}", r"prune\.ramp\.end: 0\.5 is not after start=0\.6"),
        ("stages.prune.prune={sparsity: 0.5, layers: {'1': 1.0}}", r"prune\.layers\['1'\]: 1\.0 is out of range"),
        ("stages.prune.prune={sparsity: 0.5, layers: {'9': 0.5}}", r"prune\.layers\['9'\]: '9' matches no linear"),
        (
            "stages.prune.prune={nm: [2, 4], layers: {'1': 0.1}}",
            r"prune\.layers: .* because an N:M pattern does not support it",
        ),
        ("stages.prune.prune={nm: [2, 4], scope: model}", r"prune\.scope: model has no effect, because an N:M pattern"),
        ("stages.prune.prune={nm: [2, 4], block: [2, 2]}", r"prune\.block: .* an N:M pattern does not support it"),
        (
            "stages.prune.prune={method: wanda, sparsity: 0.5, scope: model}",
            r"prune\.scope: model has no effect, because method wanda does not support it",
        ),
        (
            "stages.prune.prune={method: wanda, ramp: {final: 0.5}}",
            r"prune\.ramp: method wanda needs exactly one of sparsity, nm, got ramp",
        ),
        ("stages.prune.prune={method: movement, sparsity: 0.5}", r"prune\.sparsity: .*; use ramp: {final"),
        (
            "stages.prune.prune={method: movement, ramp: {final: 0.5}}",
            r"prune\.ramp\.start: start=0\.0 with initial=0\.0 prune",
        ),
        ("stages.prune.prune={method: srste, sparsity: 0.5}", r"prune\.sparsity: .*; use nm: \[2, 4\]"),
        ("stages.prune={max_steps: 0, prune: {ramp: {final: 0.5}}}", r"prune\.ramp: the stage prunes during training"),
        ("stages.prune={max_steps: 0, prune: {method: srste, nm: [2, 4]}}", r"prune\.method: the stage prunes during"),
        (
            "stages.prune.prune={method: taylor, sparsity: 0.5, calibration_batches: 0}",
            r"calibration_batches: 0 is out",
        ),
        (
            "stages.prune={max_steps: 5, rewind: {}, prune: {ramp: {final: 0.5}}}",
            r"prune\.ramp: .* rewind needs the mask",
        ),
    ],
)
def test_an_invalid_prune_block_is_refused_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        validate_recipe(run_of(tmp_path, override).recipe)


def test_methods_that_fit_no_layer_or_no_strategy_are_refused_before_anything_runs(tmp_path: Path) -> None:
    cnn = ["model={factory: 'qatkit.models:cnn'}", "stages.prune.prune={method: wanda, sparsity: 0.5}"]
    with pytest.raises(
        QatkitError, match=r"stages\.prune\.prune: 'wanda' prunes only linear layers, but layer 'conv1'"
    ):
        validate_recipe(run_of(tmp_path, *cnn).recipe)
    with pytest.raises(QatkitError, match=r"prune\.method: 'taylor' requires unsharded weights, but fsdp2 shards them"):
        run_of(tmp_path, "trainer.strategy=fsdp2", "stages.prune.prune={method: taylor, sparsity: 0.5}")


METHODS = {
    "wanda": "{method: wanda, nm: [2, 4]}",
    "sparsegpt": "{method: sparsegpt, sparsity: 0.5}",
    "taylor": "{method: taylor, sparsity: 0.5, scope: model}",
    "movement": "{method: movement, ramp: {final: 0.5, start: 0.1}}",
    "srste": "{method: srste, nm: [2, 4]}",
}


@pytest.mark.parametrize("method", representatives(list(METHODS), {1, 3}))
def test_every_method_prunes_its_fraction_and_later_stages_keep_the_zeros(tmp_path: Path, method: str) -> None:
    prune = f"{{max_steps: 20, prune: {METHODS[method]}}}"
    stages = f"stages={{dense: {{max_steps: 20}}, prune: {prune}, more: {{max_steps: 5}}}}"
    run = run_of(tmp_path, stages, "export=null")
    run_stages(run)
    zeros = run.record("prune").zeros
    assert sum(zeros.values()) == (2048 + 320) / 2
    assert run.record("more").zeros == zeros
    one, two = (load_file(run.folder(stage) / "model" / "model.safetensors") for stage in ("prune", "more"))
    for name in ("1.weight", "3.weight"):
        assert torch.equal(one[name] != 0, two[name] != 0)
        assert not torch.equal(one[name], two[name])
    assert run.rows == ["dense", "prune", "more"]


def test_gptq_is_refused_where_it_would_move_the_zeros_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"stages\.qat\.quantize\.init: 'gptq' adjusts the remaining weights"):
        run_of(tmp_path, "stages.qat.quantize.init=gptq")
    run_of(tmp_path, "stages.qat.quantize.init=gptq", "stages.ptq.hold_sparsity=false")


@pytest.mark.parametrize(
    "quantize", ["{scheme: Q4_K}", "{scheme: IQ4_NL}", "{scheme: Q8_0, layers: {'*': {scheme: Q2_K}}}"]
)
def test_types_without_a_zero_are_refused_where_they_would_move_the_zeros(quantize: str, tmp_path: Path) -> None:
    with pytest.raises(
        QatkitError,
        match=r"qat\.quantize\.(weight|layers\.\*): Q2_K, Q4_K, Q5_K and IQ4_NL have no value.*use Q3_K",
    ):
        run_of(tmp_path, f"stages.qat.quantize={quantize}")
