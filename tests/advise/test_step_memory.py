"""The predicted memory of a training step equals what the allocator reports while Lightning trains the stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from qatkit import QatkitError
from qatkit.advise import fit as planner_fit
from qatkit.advise.fit import check_fit
from qatkit.advise.plan import plan_recipe
from qatkit.advise.step_memory import step_memory
from qatkit.recipe.loading import load_recipe
from tests.support.matrix import representatives
from tests.support.memory import RECIPE, measured


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes have the same tokens."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def close(predicted: int, found: int) -> None:
    assert abs(predicted / found - 1) < 0.15, f"{predicted} predicted, {found} measured: {predicted / found:.3f}"


@pytest.mark.parametrize(
    ("stage", "overrides"),
    representatives(
        [
            ("dense", []),
            ("dense", ["trainer.precision=bf16-mixed", "stages.dense.batch_size=8"]),
            ("dense", ["stages.dense.batch_size=1", "model.args.layers=6", "stages.dense.accumulate=2"]),
            ("dense", ["stages.dense.lora={rank: 8}", "model.args.hidden=64"]),
            ("dense", ["stages.dense.optimizer=adamw8bit", "model.args.hidden=128"]),
            ("dense", ["stages.dense.lora={rank: 8, bits: 4}"]),
            ("dense", ["stages.dense.lora={rank: 4, bits: 4}", "model.args.hidden=256", "stages.dense.batch_size=1"]),
            ("dense", ["stages.dense.lora={rank: 8, bits: 8}"]),
            ("dense", ["stages.dense.lora={rank: 4, bits: 8}", "model.args.hidden=256", "stages.dense.batch_size=1"]),
            ("qat", []),
            ("qat", ["stages.qat.distill.cache={top_k: 16}"]),
            ("qat", ["stages.qat.distill.cache={top_k: 64}", "stages.qat.batch_size=16"]),
            ("qat", ["stages.qat.quantize.include=['*.mlp.*']", "stages.qat.quantize.exclude=[]"]),
            (
                "qat",
                ["stages.qat.quantize={weight: {num_bits: 4, strategy: group, group_size: 32}, exclude: [lm_head]}"],
            ),
        ],
        {0, 9},
    ),
    ids=[
        "full",
        "bf16",
        "accumulated",
        "lora",
        "8-bit moments",
        "nf4",
        "nf4, weights above all",
        "int8",
        "int8, weights above all",
        "w8a8 and kd",
        "w8a8 and cached kd",
        "w8a8 and cached kd, answers above all",
        "w8a8 in part and kd",
        "int4 in groups and kd",
    ],
)
def test_a_llama_takes_what_was_predicted(stage: str, overrides: list[str], recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, overrides)
    plan = {plan.stage: plan for plan in plan_recipe(loaded)}[stage]
    assert plan.unknown == ""
    close(plan.memory.total, measured(loaded, stage, tmp_path / "run"))
    assert (plan.memory.teacher > 0) == (stage == "qat" and "cache" not in " ".join(overrides))


def test_a_gpt2_takes_what_was_predicted(recipe: Path, tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
    # without dropout: transformers loads models in eval mode
    rest = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**shape, **rest)).save_pretrained(tmp_path / "gpt2")
    model = f"model={{factory: 'qatkit.models:causal_lm', args: {{name_or_path: '{tmp_path / 'gpt2'}'}}}}"
    loaded = load_recipe(recipe, [model])
    plan = plan_recipe(loaded)[0]
    close(plan.memory.total, measured(loaded, "dense", tmp_path / "run"))


def test_the_parts_of_a_step_have_a_closed_form() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 8, bias=False))
    model[0].weight.requires_grad_(False)
    found = step_memory(model, lambda model, _: model(torch.zeros(64, 256)).sum())
    assert (found.parameters, found.trained) == (256 * 512 + 512 * 8, 512 * 8)
    assert (found.weights, found.gradients, found.optimizer) == (4 * found.parameters, 4 * 4096, 8 * 4096)
    assert found.total >= found.weights + found.gradients + found.optimizer + 4 * 64 * 512
    halved = step_memory(model, lambda model, _: model(torch.zeros(64, 256)).sum(), bits={"0.weight": 4.0})
    assert found.weights - halved.weights == 256 * 512 * 4 - 256 * 512 // 2
    assert found.on_each(2, "ddp") == found.total + found.gradients


def test_fsdp2_shares_out_and_holds_buffers() -> None:
    def step(model: nn.Module, _: nn.Module | None) -> torch.Tensor:
        loss: torch.Tensor = model(torch.zeros(rows, 128)).sum()
        return loss

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))
    size, rows = 8 * 128 * 128 * 4, 4096
    found = step_memory(model, step)
    # a fourth of weights, gradients and two moments is kept besides the weights that are gathered
    assert found.on_each(4, "fsdp2") == found.total - 2 * size + size
    assert found.on_each(4, "fsdp2", fused=True) == found.total - 2 * size + 2 * size
    rows = 1  # then the most is held when the gradients are copied to be reduced
    assert step_memory(model, step).on_each(4, "fsdp2") == size + size + 2 * size
    model[:-1].requires_grad_(False)  # or, where few weights are trained, when all are copied after they were gathered
    assert step_memory(model, step).on_each(4, "fsdp2") == (size + 3 * size // 8) // 4 + size + size


def test_a_stage_that_cannot_fit_is_refused_with_the_number_and_what_would_fit(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe, ["stages.dense.batch_size=64"])
    plans = plan_recipe(loaded)
    check_fit(loaded, plans)  # this machine has room
    need = plans[0].memory.total
    monkeypatch.setattr(planner_fit, "device_of", lambda trainer: planner_fit.Device("a small device", need // 2, 1))
    with pytest.raises(QatkitError) as caught:
        check_fit(loaded, plans)
    message = str(caught.value)
    assert message.startswith(f"stages.dense: training needs {need / 1e6:.1f} MB per device, but a small device has")
    assert "stages.dense.batch_size=1 stages.dense.accumulate=64 (" in message
    assert message.endswith("; or use --force")
    monkeypatch.setattr(planner_fit, "device_of", lambda trainer: planner_fit.Device("a toy", 1000, 1))
    with pytest.raises(QatkitError, match=r"use a smaller model; no other change makes it fit"):
        check_fit(loaded, plans)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    representatives(
        [
            (
                ["stages.dense.batch_size=4"],
                r"stages\.dense\.batch_size=1 .* with stages\.dense\.lora='{rank: 16, bits: 4}'",
            ),
            (["stages.dense.lora={rank: 16}"], r"stages\.dense\.batch_size=1 .* with stages\.dense\.lora\.bits=4"),
            (["stages.dense.quantize={scheme: W8A8, observer: lsq}"], r" with stages\.dense\.lora='{rank: 16}'"),
        ],
        {0},
    ),
    ids=["full", "adapters", "quantized"],
)
def test_what_fits_only_with_everything_at_once_is_named(
    overrides: list[str], advice: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe, [*overrides, "stages.qat.max_steps=0", "model.args.hidden=256"])
    plans = plan_recipe(loaded)
    setting = dict(planner_fit.settings(loaded))["dense"]
    sizes = dict(planner_fit._options(loaded, "dense", setting, planner_fit.device_of(loaded.trainer), ()))
    least = min(sizes.values())
    monkeypatch.setattr(planner_fit, "device_of", lambda trainer: planner_fit.Device("small", least, 1))
    with pytest.raises(QatkitError, match=advice):
        check_fit(loaded, plans)


def test_data_that_are_no_texts_leave_the_activations_out() -> None:
    plans = plan_recipe(load_recipe("vision/digits_int8"))
    assert [plan.stage for plan in plans] == ["dense", "qat"]
    assert all(plan.memory.activations is None and "sample length" in plan.unknown for plan in plans)
