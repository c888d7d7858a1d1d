"""The pipeline's LightningModule: its schedule, its optimizer groups, its random numbers, its loss of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import get_wsd_schedule

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.lora.attachment import Adapter, attach, target_layers
from qatkit.pipeline.learning_rate import SCALE_LR, lr_factor, parameter_groups
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.sharding import parallelize
from qatkit.recipe import StageConfig
from qatkit.tasks import evaluate
from tests.models.families import tiny
from tests.support.texts import VOCAB, loader, texts, tiny_llama


@pytest.mark.parametrize(
    ("progress", "schedule", "warmup", "factor"),
    [
        (0.0, "cosine", 0.0, 1.0),
        (0.25, "cosine", 0.0, 0.5 * (1 + 0.5**0.5)),
        (1.0, "cosine", 0.0, 0.0),
        (0.5, "linear", 0.0, 0.5),
        (0.9, "constant", 0.0, 1.0),
        (0.05, "cosine", 0.1, 0.5),
        (0.55, "linear", 0.1, 0.5),
        (1.0, "constant", 1.0, 1.0),
        (0.05, "wsd", 0.1, 0.5),
        (0.5, "wsd", 0.1, 1.0),
        (0.8, "wsd", 0.1, 1.0),
        (0.85, "wsd", 0.1, 0.5),
        (0.9, "wsd", 0.1, 1 - 0.5**0.5),
        (1.0, "wsd", 0.1, 0.0),
    ],
)
def test_the_learning_rate_rises_over_the_warmup_and_then_follows_its_schedule(
    progress: float, schedule: str, warmup: float, factor: float
) -> None:
    assert lr_factor(progress, schedule, warmup) == pytest.approx(factor)  # type: ignore[arg-type]


def test_wsd_is_that_of_transformers_with_a_root_in_its_decay() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    theirs = get_wsd_schedule(
        torch.optim.SGD([parameter], lr=1.0), 10, 30, num_training_steps=100, decay_type="1-sqrt"
    ).lr_lambdas[0]
    for step in range(101):
        assert lr_factor(step / 100, "wsd", 0.1, 0.3) == pytest.approx(theirs(step), abs=1e-7), step


def test_weight_decay_is_for_matrices_and_scales_move_slower() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    prepare_qat(model, QuantSpec(4, observer="lsq"))
    matrices, vectors, scales = parameter_groups(model, lr=0.1, weight_decay=0.5)
    assert ([p.dim() for p in matrices["params"]], matrices["weight_decay"]) == ([2, 2], 0.5)
    assert ([p.dim() for p in vectors["params"]], vectors["weight_decay"]) == ([1, 1, 1, 1], 0.0)
    assert (scales["weight_decay"], scales["lr"]) == (0.0, 0.1 * SCALE_LR)
    assert [p.shape for p in scales["params"]] == [torch.Size([8, 1]), torch.Size([2, 1])]


def test_an_offset_that_is_learned_is_treated_as_a_scale_also_per_channel() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    prepare_qat(model, QuantSpec(4, symmetric=False, observer="lsq_plus"))
    matrices, scales = parameter_groups(model, lr=0.1, weight_decay=0.5)
    assert [p.shape for p in matrices["params"]] == [torch.Size([8, 8])]
    assert [p.shape for p in scales["params"]] == [torch.Size([8, 1]), torch.Size([8, 1])]
    assert scales["weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(4, 2)
    model.bias.requires_grad_(False)
    assert len(parameter_groups(model, 0.1, 0.0)) == 1


class PlainDescent(CompressionModule):
    """One step with learning rate 1: the change of the weights is the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def gradients(batch_size: int, accumulate: int, rows: range | None = None, steps: int = 1) -> dict[str, torch.Tensor]:
    """What Lightning's steps change in every weight of a small Llama."""
    module = PlainDescent(tiny_llama(), StageConfig(max_steps=steps), seed=0)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=accumulate, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(batch_size, rows))
    return {name: before[name] - value.detach() for name, value in module.named_parameters()}


def test_accumulated_batches_of_unlike_numbers_of_labels_give_the_gradient_of_the_one_large_batch() -> None:
    whole = gradients(batch_size=8, accumulate=1)
    parts = gradients(batch_size=4, accumulate=2)
    uneven = gradients(batch_size=3, accumulate=3)  # 3, 3 and 2 rows
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(uneven[name], gradient, rtol=1e-4, atol=1e-7)
    first, second = gradients(4, 1, range(4)), gradients(4, 1, range(4, 8))
    name = max(whole, key=lambda name: whole[name].numel())
    mean_of_means = (first[name] + second[name]) / 2
    assert (mean_of_means - whole[name]).norm() > 0.1 * whole[name].norm(), "unlike batches must matter here"


def test_the_last_step_of_an_epoch_is_a_mean_over_the_fewer_batches_that_it_has() -> None:
    alone = gradients(batch_size=3, accumulate=1, rows=range(5, 8))
    cut_off = gradients(batch_size=3, accumulate=4, rows=range(5, 8))
    for name, gradient in alone.items():
        torch.testing.assert_close(cut_off[name], gradient, rtol=1e-4, atol=1e-7)


def test_validation_of_a_text_counts_every_token_once() -> None:
    module = CompressionModule(tiny_llama(), StageConfig(max_steps=1), seed=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(module, loader(3), verbose=False)
    with torch.no_grad():
        loss = float(module.model(**texts()).loss)
    assert found["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["val/accuracy"] == pytest.approx(evaluate(module.model, loader(8))["accuracy"])


def test_a_whole_batch_may_be_given_as_keywords_and_its_labels_stay_out_of_the_model() -> None:
    module = CompressionModule(tiny_llama(), StageConfig(max_steps=1), seed=0)
    output = module(**texts())
    assert output.loss is None
    assert output.logits.shape == (8, 12, VOCAB)


def test_a_model_that_comes_in_evaluation_mode_is_trained_with_its_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    assert CompressionModule(model, StageConfig(max_steps=1), seed=0).model[1].training


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    distributed.destroy_process_group()


def test_a_head_of_16_bits_is_sharded_beside_factors_of_32(mesh: DeviceMesh) -> None:
    model = tiny("llama", "SequenceClassification", num_labels=2, pad_token_id=0).bfloat16()
    attach(model, target_layers(model), Adapter(rank=2, alpha=4))
    parallelize(model, mesh)
    model(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.float().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for name, p in trained.items() if "lora_" in name} == {torch.float32}
    assert trained["score.weight"].dtype == torch.bfloat16
    assert all(p.grad is not None for p in trained.values())


def test_weights_of_16_bits_with_scales_of_32_are_refused_where_they_are_sharded(mesh: DeviceMesh) -> None:
    model = tiny_llama().bfloat16()
    prepare_qat(model, weight=QuantSpec(4, observer="lsq"), exclude=["lm_head"])
    with pytest.raises(QatkitError, match=r"strategy: FSDP2 needs one dtype per group, .* in bfloat16 and float32"):
        parallelize(model, mesh)
