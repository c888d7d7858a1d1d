"""A stage of a recipe trains as the plain loop that anybody writes with transformers, peft and torch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from qatkit.common.labels import IGNORED
from qatkit.data import Source, causal_text
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny

STEPS, BATCH, CONTEXT, LR = 20, 4, 32, 3e-3


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny("qwen3").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    save_tokenizer(tmp_path / "model")
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES * 3])
    return tmp_path


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[float]:
    """The loss of every batch of a stage."""
    recipe = {
        "name": "plain",
        "seed": 5,
        "model": {"factory": "qatkit.models:causal_lm", "args": {"name_or_path": str(folder / "model")}},
        "data": {
            "factory": "qatkit.data:causal_text",
            "args": {
                "source": {"path": str(folder / "texts.jsonl")},
                "tokenizer": str(folder / "model"),
                "context": CONTEXT,
                "epoch_batches": 8,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
        "stages": {"dense": {"max_steps": STEPS, "batch_size": BATCH, "lr": LR, "warmup": 0.25, "gradient_clip": 0.5}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    losses: list[float] = []
    step = CompressionModule.training_step

    def recorded(self: CompressionModule, batch: Any, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", recorded)
        run_stages(Run(load_recipe(str(folder / "recipe.yaml"), list(overrides)), folder / "run"))
    return losses


def adapted(model: Any, dora: bool, bits: bool) -> Any:
    """The model under adapters of peft, over a base of bitsandbytes where it is held in 4 bits."""
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    for name in names if bits else ():
        layer = model.get_submodule(name)
        four = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        four.weight = bitsandbytes.nn.Params4bit(layer.weight.data, False, quant_type="nf4", module=four)
        four.support_avx512bf16_for_cpu = False  # validation would repack the weights in place
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, four.to("cpu"))
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=dora)
    return get_peft_model(model, config)


def plain(folder: Path, accumulate: int, adapters: dict[str, bool] | None = None) -> list[float]:
    """The same without qatkit's training: transformers' model, loss and schedule, torch's optimizer and clipping."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = (model if adapters is None else adapted(model, **adapters)).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices, vectors = ([weight for weight in trained if (weight.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 4, STEPS)
    loader = causal_text(
        Source(str(folder / "texts.jsonl")), str(folder / "model"), CONTEXT, epoch_batches=8, batch_size=BATCH, seed=5
    ).train_dataloader()
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS * accumulate:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epoch += 1
        batches = list(loader)
        for start in range(0, len(batches), accumulate):
            together = batches[start : start + accumulate]
            count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in together)
            for batch in together:
                with torch.no_grad():
                    losses.append(float(model(**batch).loss))
                model(**batch, num_items_in_batch=count).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return losses[: STEPS * accumulate]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_of_the_first_20_steps_are_those_of_a_plain_loop(
    accumulate: int, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained(corpus, monkeypatch, f"stages.dense.accumulate={accumulate}")
    theirs = plain(corpus, accumulate)
    assert len(ours) == len(theirs) == STEPS * accumulate
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < 0.9 * ours[0]


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "QLoRA"])
def test_the_losses_under_adapters_are_those_of_a_loop_with_peft(
    kind: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"LoRA": "", "DoRA": ", dora: true", "QLoRA": ", bits: 4, double_quant: false"}[kind]
    ours = trained(corpus, monkeypatch, f"stages.dense.lora={{rank: 4, alpha: 8{extra}}}")
    theirs = plain(corpus, 1, {"dora": kind == "DoRA", "bits": kind == "QLoRA"})
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < 0.99 * ours[0]


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(corpus, monkeypatch, "trainer.compile=true") == pytest.approx(plain(corpus, 1), abs=1e-3)
