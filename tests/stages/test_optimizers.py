"""The optimizers of bitsandbytes in a stage: theirs to the bit, 32 bits where 8 would hurt, resumed, and refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.pipeline.learning_rate import parameter_groups
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.stages.optimizers import build_optimizer, check_optimizer, moment_memory
from tests.support.recipes import assert_says, refusal
from tests.support.texts import VOCAB, tiny_llama

RECIPE = """
name: few_bits
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [96, 96], num_classes: 10}}
data: {factory: "qatkit.data:digits"}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 60, lr: 3.0e-3, optimizer: adamw8bit}
"""


def recipe_in(folder: Path) -> Path:
    path = folder / "few_bits.yaml"
    path.write_text(RECIPE)
    return path


def steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(VOCAB, (2, 12), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def states(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.dtype]:
    return {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters() if p in optimizer.state}


def test_it_is_the_class_of_bitsandbytes_to_the_bit() -> None:
    model, other = nn.Linear(128, 64), nn.Linear(128, 64)
    other.load_state_dict(model.state_dict())
    ours = build_optimizer("adamw8bit", model, parameter_groups(model, 1e-2, 0.1))
    theirs = bnb.optim.AdamW8bit(
        [{"params": [other.weight], "weight_decay": 0.1}, {"params": [other.bias], "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(4):
        inputs = torch.randn(8, 128)
        for each, optimizer in ((model, ours), (other, theirs)):
            each(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    assert ours.state[model.weight]["state1"].dtype == torch.uint8


def test_scales_and_embeddings_stay_in_32_bits_however_large_they_are() -> None:
    model = tiny_llama()
    assert sum(p.numel() for p in model.get_input_embeddings().parameters()) > 4096
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 1024)
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 1024)
    model.model.layers[0].mlp.down_proj = nn.Linear(1024, 32)
    spec = QuantSpec(4, strategy="group", group_size=4, observer="lsq")
    prepare_qat(model, weight=spec, include=["*.mlp.*"])
    model.eval()(torch.zeros(1, 4, dtype=torch.long))
    for module in model.modules():
        if (scale := getattr(module, "scale", None)) is not None and scale.isnan().any():
            scale.data.fill_(0.05)
    optimizer = build_optimizer("adamw8bit", model, parameter_groups(model, 1e-3, 0.0))
    steps(optimizer, model)
    found = states(optimizer, model)
    scales = {name: dtype for name, dtype in found.items() if name.endswith("scale")}
    assert max(model.get_parameter(name).numel() for name in scales) == 8192
    assert set(scales.values()) == {torch.float32}
    assert found["model.embed_tokens.weight"] == torch.float32
    assert found["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert found["model.norm.weight"] == torch.float32


def test_a_later_parameter_does_not_inherit_the_32_bits_of_one_that_is_gone() -> None:
    manager: Any = bnb.optim.GlobalOptimManager.get_instance()
    before = len(manager.pid2config)
    model = tiny_llama()
    build_optimizer("adamw8bit", model, parameter_groups(model, 1e-3, 0.0))
    assert len(manager.pid2config) == before + 1
    del model
    gc.collect()
    assert len(manager.pid2config) == before


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_what_is_predicted_for_the_moments_is_what_they_take(name: Any) -> None:
    model = tiny_llama()
    optimizer = build_optimizer(name, model, parameter_groups(model, 1e-3, 0.0))
    steps(optimizer, model)
    keys = {"exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"}  # besides tables that all share
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key in keys
    )
    assert moment_memory(name, model).held == held


def test_pages_are_not_counted_as_held_on_the_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 16, bias=False))
    found = moment_memory("paged_adamw", model, "cuda")
    assert (found.held, found.paged) == (8 * (1024 * 1024 + 16 * 1024), 8 * 1024 * 1024)
    assert found.update == found.paged, "one weight's moments are there while it is updated"


def test_a_stage_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recipe(recipe_in(tmp_path))
    whole, stopped = (Run(loaded, tmp_path / name) for name in ("whole", "stopped"))
    run_stages(whole)
    assert whole.record("dense").metrics["test/accuracy"] > 0.8

    def stop(self: CompressionModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 40:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "on_train_batch_start", stop)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            run_stages(stopped)
    checkpoint = torch.load(stopped.folder("dense") / "last.ckpt", weights_only=True)
    assert 0 < checkpoint["global_step"] < 40
    run_stages(stopped)
    first, second = (run.load_model("dense").state_dict() for run in (whole, stopped))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "instead"), [("paged_adamw", "adamw"), ("paged_adamw8bit", "adamw8bit")])
def test_pages_are_refused_on_a_cpu_before_anything_runs(name: str, instead: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe_in(tmp_path), [f"stages.dense.optimizer={name}"])
    with pytest.raises(QatkitError) as caught:
        validate_recipe(loaded)
    assert_says(str(caught.value), "stages.dense.optimizer", f"'{name}'", "on cpu", f"use {instead}, or")


def test_a_device_without_kernels_is_refused_with_what_it_said() -> None:
    with pytest.raises(QatkitError, match=r"optimizer: bitsandbytes cannot run 'adamw8bit' on meta \(.*; use adamw"):
        check_optimizer("adamw8bit", torch.device("meta"))


def test_an_unknown_name_and_sharded_weights_are_refused_by_their_keys(tmp_path: Path) -> None:
    path = recipe_in(tmp_path)
    said = refusal(path, "stages.dense.optimizer=adamw_8bit")
    assert_says(said, "stages.dense.optimizer", "'adamw_8bit'", "did you mean")
    said = refusal(path, "trainer.strategy=fsdp2")
    assert_says(said, "stages.dense.optimizer", "'adamw8bit'", "fsdp2 shards them; use adamw")
