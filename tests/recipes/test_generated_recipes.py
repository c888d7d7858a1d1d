"""A recipe whose student and teacher write texts, on text that comes with Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qatkit import QatkitError
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.support.recipes import assert_says, refusal

pytestmark = pytest.mark.slow

RECIPE = """
name: written
seed: 3
model:
  factory: "qatkit.models:llama"
  args: {vocab_size: 300, hidden: 32, layers: 2, heads: 2, kv_heads: 1, intermediate: 64, context: 24}
data:
  factory: "qatkit.data:stdlib_text"
  args: {vocab_size: 300, context: 16, include: ["email/*"], val_fraction: 0.2, test_fraction: 0.1, epoch_batches: 10}
trainer: {accelerator: cpu}
stages:
  dense: {max_steps: 30, batch_size: 32, lr: 3.0e-3}
  qat:
    max_steps: 20
    batch_size: 32
    lr: 1.0e-3
    distill:
      alpha: 0.5
      on_policy: {fraction: 0.5, ramp: 0.2, prompt: 8, new_tokens: 8}
      sequence_level: {fraction: 0.25, prompt: 8, new_tokens: 8, temperature: 0.0}
    quantize: {weight: {num_bits: 3, observer: lsq}, exclude: [lm_head]}
export: {format: dense}
"""


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def run_of(folder: Path, *overrides: str) -> Run:
    (folder / "written.yaml").write_text(RECIPE)
    return Run(load_recipe(folder / "written.yaml", list(overrides)), folder / "run")


def batches_of(run: Run, until: str | None = None, breaks_at: int | None = None) -> list[dict[str, Tensor]]:
    """The batches that the stage qat trained on."""
    seen: list[dict[str, Tensor]] = []
    step = CompressionModule.training_step

    def watched(self: CompressionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.stage.distill is not None:
            if self.global_step == breaks_at:
                raise RuntimeError("the power is gone")
            seen.append(batch)
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", watched)
        if breaks_at is None:
            run_stages(run, until)
        else:
            with pytest.raises(RuntimeError, match="the power is gone"):
                run_stages(run, until)
    return seen


def test_a_recipe_trains_on_texts_of_student_and_teacher_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole, broken = run_of(tmp_path / "whole"), run_of(tmp_path / "broken")
    seen = batches_of(whole)
    written = ["attention_mask" in batch for batch in seen]
    assert 6 <= sum(written) <= 18
    for batch in seen:
        if "attention_mask" in batch:
            ends = (batch["input_ids"][:, 8:] == 0).long()  # the tokenizer's end of a document
            counted = batch["labels"] != -100
            assert not counted[:, :8].any()
            assert torch.equal(counted[:, 8:], ends.cumsum(dim=1) - ends == 0)
    batches_of(broken, breaks_at=12)
    later = batches_of(broken)
    assert len(later) == 10, "from the checkpoint of step 10"
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(seen[10:], later, strict=True))
    first, second = (run.folder("qat") / "model" / "model.safetensors" for run in (whole, broken))
    assert first.read_bytes() == second.read_bytes()
    assert whole.record("qat").metrics["test/loss"] < 5.7  # that of a model that knows nothing: log 300
    assert load_file(first)


def test_a_model_that_cannot_write_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=r"^stages\.qat\.distill\.on_policy: \w+ cannot generate text"):
        validate_recipe(run_of(tmp_path, 'model={factory: "qatkit.models:mlp"}').recipe)
    long = run_of(tmp_path, "stages.qat.distill.sequence_level.new_tokens=32").recipe
    with pytest.raises(
        QatkitError, match=r"^stages\.qat\.distill\.sequence_level: .* 40 tokens, but the model has only 24 positions"
    ):
        validate_recipe(long)


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("on_policy.fraction=0.9", "", "0.9 and sequence_level.fraction 0.25 add up to more than 1"),
        ("on_policy.fraction=2", ".on_policy.fraction", "2.0 is out of range"),
        ("on_policy.prompt=0", ".on_policy.prompt", "use a positive integer"),
        ("sequence_level.temperature=-1", ".sequence_level.temperature", "use a non-negative number"),
        ("on_policy.tokens=3", ".on_policy.tokens", "unknown key; did you mean 'new_tokens'?"),
    ],
)
def test_wrong_values_are_refused_by_their_key(tmp_path: Path, override: str, key: str, said: str) -> None:
    (tmp_path / "written.yaml").write_text(RECIPE)
    message = refusal(tmp_path / "written.yaml", f"stages.qat.distill.{override}")
    assert_says(message, f"stages.qat.distill{key or '.on_policy.fraction'}", said)
