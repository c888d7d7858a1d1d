"""The predicted memory of a training step is what the allocator gives while Lightning trains the same stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from qatkit import QatkitError, blocks, planner_fit
from qatkit.analysis.memory import step_memory
from qatkit.engine import CompressionModule
from qatkit.loading import load_recipe
from qatkit.pipeline import Run
from qatkit.planner import plan_recipe
from qatkit.planner_fit import check_fit
from qatkit.recipe import Recipe
from qatkit.teachers import Teaching
from qatkit.training import train

RECIPE = """
name: tiny
model: {factory: "qatkit.models:llama", args: {vocab_size: 300, hidden: 96, layers: 3, heads: 4, kv_heads: 2,
  intermediate: 256, context: 64}}
data: {factory: "qatkit.data:stdlib_text", args: {vocab_size: 300, context: 64, include: ["email/*"],
  val_fraction: 0.2, test_fraction: 0.1}}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 3, batch_size: 4}
  qat:
    max_steps: 3
    batch_size: 4
    distill: {temperature: 2.0, alpha: 0.7}
    quantize: {scheme: W8A8, observer: lsq, exclude: [lm_head]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def measured(recipe: Recipe, stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The peak of what torch's CPU allocator holds while the pipeline trains a stage, and the weights before it."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    before = 0

    def start(self: CompressionModule) -> None:
        nonlocal before
        held = {id(tensor): tensor for part in models for tensor in (*part.parameters(), *part.buffers())}
        before = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        profiler.start()

    monkeypatch.setattr(CompressionModule, "on_train_start", start)
    monkeypatch.setattr(CompressionModule, "on_train_end", lambda self: profiler.stop())
    run = Run(recipe, folder)
    model = run.build_model()
    distill = recipe.stages[stage].distill
    taught = distill and Teaching(distill, blocks.distill.teacher(distill, run.build_model()), None)
    models = [model] if taught is None else [model, taught.teacher.model]
    folder.mkdir(parents=True)
    train(recipe, stage, model, taught, run.build_data, folder, [])
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0, "the profiler saw no allocation"
    return before + peak


def close(predicted: int, found: int) -> None:
    assert abs(predicted / found - 1) < 0.15, f"{predicted} predicted, {found} measured: {predicted / found:.3f}"


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("dense", []),
        ("dense", ["trainer.precision=bf16-mixed", "stages.dense.batch_size=8"]),
        ("dense", ["stages.dense.batch_size=1", "model.args.layers=6", "stages.dense.accumulate=2"]),
        ("dense", ["stages.dense.lora={rank: 8}", "model.args.hidden=64"]),
        ("dense", ["stages.dense.optimizer=adamw8bit", "model.args.hidden=128"]),
        ("qat", []),
        ("qat", ["stages.qat.quantize.include=['*.mlp.*']", "stages.qat.quantize.exclude=[]"]),
        ("qat", ["stages.qat.quantize={weight: {num_bits: 4, strategy: group, group_size: 32}, exclude: [lm_head]}"]),
    ],
    ids=[
        "full",
        "bf16",
        "accumulated",
        "lora",
        "8-bit moments",
        "w8a8 and kd",
        "w8a8 in part and kd",
        "int4 in groups and kd",
    ],
)
def test_a_llama_takes_what_was_predicted(
    stage: str, overrides: list[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recipe(recipe, overrides)
    plan = {plan.stage: plan for plan in plan_recipe(loaded)}[stage]
    assert plan.unknown == ""
    close(plan.memory.total, measured(loaded, stage, tmp_path / "run", monkeypatch))
    assert (plan.memory.teacher > 0) == (stage == "qat")


def test_a_gpt2_takes_what_was_predicted(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 300, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
    # without dropout: transformers loads models in eval mode
    rest = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**shape, **rest)).save_pretrained(tmp_path / "gpt2")
    model = f"model={{factory: 'qatkit.models:causal_lm', args: {{name_or_path: '{tmp_path / 'gpt2'}'}}}}"
    loaded = load_recipe(recipe, [model])
    plan = plan_recipe(loaded)[0]
    close(plan.memory.total, measured(loaded, "dense", tmp_path / "run", monkeypatch))


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
    model[0].weight.requires_grad_(True)
    whole = step_memory(model, lambda model, _: model(torch.zeros(64, 256)).sum())
    # a fourth of weights, gradients and two moments is kept besides the weights that are gathered
    assert whole.on_each(4, "fsdp2") == whole.total - whole.weights


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
    assert message.startswith(
        f"stages.dense: training needs {need / 1e6:.1f} MB on each device, and a small device has"
    )
    assert "stages.dense.batch_size=1 stages.dense.accumulate=64 (" in message
    assert message.endswith("; or --force")
    monkeypatch.setattr(planner_fit, "device_of", lambda trainer: planner_fit.Device("a toy", 1000, 1))
    with pytest.raises(QatkitError, match=r"nothing that is known makes it fit"):
        check_fit(loaded, plans)


def test_data_that_are_no_texts_leave_the_activations_out() -> None:
    plans = plan_recipe(load_recipe("vision/digits_int8"))
    assert [plan.stage for plan in plans] == ["dense", "qat"]
    assert all(plan.memory.activations is None and "how long" in plan.unknown for plan in plans)
