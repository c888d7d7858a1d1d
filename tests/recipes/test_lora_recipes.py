"""Adapters in recipes: saved for peft, merged at the stage's border, on the grid that is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qatkit import QatkitError
from qatkit.lora.bits import dequantized, quantize_base
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.pipeline.verify import verify_run
from qatkit.quantization.prepare import qat_layers
from qatkit.recipe.loading import load_recipe
from qatkit.report.tables import comparison
from qatkit.run.folder import Run
from tests.support.recipes import refusal

RECIPE = """
name: adapted
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [64], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 40, lr: 3.0e-3}
  lora: {max_steps: 20, lora: {rank: 4, alpha: 8, dropout: 0.1}}
  qlora: {max_steps: 20, lora: {rank: 4, alpha: 8, bits: 4}}
  qat: {max_steps: 20, lora: {rank: 4, alpha: 8}, quantize: {weight: {num_bits: 4, observer: lsq}}}
  prune: {max_steps: 10, prune: {nm: [2, 4]}}
  sparse: {max_steps: 20, lora: {rank: 4, alpha: 8}}
  int4: {max_steps: 20, lora: {rank: 4, alpha: 8}, quantize: {weight: {num_bits: 4}}}
export: {format: dense}
"""
SMALL = [
    "model.args={vocab_size: 300, hidden: 32, layers: 1, heads: 2, kv_heads: 1, intermediate: 64, context: 16}",
    "data.args={vocab_size: 300, context: 16, include: ['email/*'], val_fraction: 0.1, test_fraction: 0.05, "
    "epoch_batches: 10}",
]


def recipe_of(folder: Path) -> Path:
    path = folder / "adapted.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("adapted")
    run = Run(load_recipe(str(recipe_of(folder))), folder / "run")
    run_stages(run)
    return run


@pytest.fixture(scope="module")
def inputs(done: Run) -> torch.Tensor:
    data = done.build_data(64)
    data.prepare_data()
    data.setup("test")
    found: torch.Tensor = next(iter(data.test_dataloader()))[0]
    return found


def test_a_stage_leaves_the_merged_model_and_the_adapters_that_lead_to_it(done: Run, inputs: torch.Tensor) -> None:
    folder = done.folder("lora") / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    peft = PeftModel.from_pretrained(done.load_model("dense"), folder).eval()  # type: ignore[arg-type]  # any module
    merged = done.load_model("lora").eval()
    torch.testing.assert_close(merged(inputs), peft(inputs))
    assert not torch.allclose(merged(inputs), done.load_model("dense").eval()(inputs), atol=1e-2)
    assert done.record("lora").metrics["test/accuracy"] > 0.5


def test_qlora_is_merged_into_the_dequantized_base_in_full_precision(done: Run, inputs: torch.Tensor) -> None:
    base, merged = done.load_model("lora"), done.load_model("qlora").eval()
    names = [name for name, module in base.named_modules() if type(module) is torch.nn.Linear]
    quantize_base(base, names, 4)
    peft = PeftModel.from_pretrained(base, done.folder("qlora") / "adapter").eval()  # type: ignore[arg-type]
    torch.testing.assert_close(merged(inputs), peft(inputs), rtol=1e-4, atol=1e-4)
    factors = load_file(done.folder("qlora") / "adapter" / "adapter_model.safetensors")
    for name in names:
        a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        layer = peft.get_submodule(f"base_model.model.{name}.base_layer")
        expected = dequantized(layer).weight.double() + 2 * b.double() @ a.double()
        torch.testing.assert_close(merged.state_dict()[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_stage_that_quantizes_ships_what_training_rounded(done: Run) -> None:
    export_run(done)
    checks = verify_run(done)
    assert all(check.passed for check in checks.values())
    assert checks["int4"].mean_error == 0.0
    assert list(checks) == ["dense", "lora", "qlora", "qat", "prune", "sparse", "int4"]
    assert {cells[0]: cells[1] for cells in comparison(report_run(done))} == {
        "dense": "dense", "lora": "trained LoRA", "qlora": "trained QLoRA", "qat": "trained LoRA w4a32",
        "prune": "trained", "sparse": "trained LoRA", "int4": "trained LoRA w4a32",
    }  # fmt: skip
    assert (done.folder("qat") / "adapter" / "adapter_model.safetensors").exists()


def test_zeros_go_through_adapters_into_int4_and_ship_merged_only(done: Run) -> None:
    pruned = done.load_model("prune", quantizers=False).state_dict()
    for stage in ("sparse", "int4"):
        state = done.load_model(stage, quantizers=False).state_dict()
        assert not (done.folder(stage) / "adapter").exists()
        for name in done.record("prune").zeros:
            zeros = pruned[f"{name}.weight"] == 0
            assert zeros.float().mean() == 0.5
            assert not state[f"{name}.weight"][zeros].any()
            assert not torch.equal(state[f"{name}.weight"], pruned[f"{name}.weight"])
        assert done.record(stage).zeros == done.record("prune").zeros
    for _, layer in qat_layers(done.load_model("int4")):
        assert ((layer.fake_quantized_weight() == 0).float().mean() >= 0.5).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qlora", "qlora_merge_int4", "int4_qat_lora"])
def test_the_recipe_that_ships_runs_made_small(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "lora_cache"))  # one corpus for all
    small = list(SMALL)
    for stage, config in load_recipe(f"llm/{name}").stages.items():
        small += [f"stages.{stage}.max_steps={min(config.max_steps, 6)}", f"stages.{stage}.batch_size=16"]
        small += [f"stages.{stage}.quantize.weight.group_size=16"] if config.quantize else []
    small += ["evaluate=null"]  # its windows are longer than the small samples
    recipe = load_recipe(f"llm/{name}", small)
    validate_recipe(recipe)
    run = Run(recipe, tmp_path)
    assert run_stages(run) == list(recipe.stages)
    export_run(run)
    for stage, check in verify_run(run).items():
        assert check.passed, (stage, check.failures)
        assert check.mean_error == 0.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.lora.lora.rank=0", "stages.lora.lora.rank: 0 is out of range; use a positive integer"),
        ("stages.lora.lora.bits=3", "stages.lora.lora.bits: bitsandbytes does not support 3 bits; use 4, 8 or null"),
        ("stages.lora.lora={bits: 8, dora: true}", "dora: peft does not support DoRA with 8-bit weights"),
        ("stages.prune.lora={rank: 4}", "stages.prune.prune: lora freezes the weights of its stage"),
        ("stages.qat.lora.bits=4", "stages.qat.lora.bits: weights frozen in 4 bits cannot be quantized"),
        (
            "stages.sparse.lora.dropout=0.1",
            "stages.sparse.lora.dropout: 0.1 is not supported with the sparsity mask of an earlier stage",
        ),
        (
            "stages.sparse.lora.bits=4",
            "stages.sparse.lora.bits: 4 is not supported with the sparsity mask of an earlier stage",
        ),
        ("trainer.strategy=fsdp2", "stages.qlora.lora.bits: FSDP2 shards floating-point parameters"),
    ],
)
def test_a_wrong_combination_is_refused_while_the_recipe_is_read(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(recipe_of(tmp_path), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.lora.lora.targets=['*.q_proj']", r"^stages\.lora\.lora\.targets\[0\]: '\*\.q_proj' matches no linear"),
        ("stages.qat.lora.dora=true", r"^stages\.qat\.lora\.dora: True is not supported for a layer that is quantized"),
        ("trainer.accelerator=mps", r"^stages\.qlora\.lora\.bits: bitsandbytes cannot quantize on mps"),
    ],
)
def test_and_before_a_weight_is_read(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=message):
        validate_recipe(load_recipe(str(recipe_of(tmp_path)), [override]))
