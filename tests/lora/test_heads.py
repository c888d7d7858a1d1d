"""Adapters on classifiers of transformers: the head that has random weights is trained, saved and loaded with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification

from qatkit import QatkitError, QuantSpec, prepare_qat
from qatkit.lora.adapter_files import save_adapter
from qatkit.lora.attachment import Adapter, attach, base_layers, merge, target_layers
from qatkit.lora.heads import classification_heads
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.data.corpus import SENTENCES, save_tokenizer, write_lines
from tests.models.families import tiny

TOKENS = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(1))
HEADS = {"bert": ["classifier", "bert.pooler"], "llama": ["score"], "gpt2": ["score"]}


def classifier(family: str, seed: int = 0) -> nn.Module:
    """The same body for every seed, another head."""
    model = tiny(family, "SequenceClassification", num_labels=3, pad_token_id=0)
    torch.manual_seed(seed)
    for name in HEADS[family]:
        for parameter in model.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def train(model: nn.Module) -> None:
    """A few steps on whatever is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model.train()(TOKENS, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", HEADS)
def test_plain_peft_loads_adapters_and_head_over_a_base_with_another_head(family: str, tmp_path: Path) -> None:
    model = classifier(family)
    assert classification_heads(model) == HEADS[family]
    names = target_layers(model)
    assert not [name for name in (*names, *base_layers(model)) if name.startswith(tuple(HEADS[family]))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attach(model, names, Adapter(rank=4, alpha=8))
    train(model)
    trained = logits(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == HEADS[family]
    other = classifier(family, seed=5)
    assert not torch.allclose(logits(other), trained, atol=0.1)
    theirs = PeftModel.from_pretrained(other, tmp_path)  # type: ignore[arg-type]  # a transformers model
    torch.testing.assert_close(logits(theirs), trained)
    merge(model)
    torch.testing.assert_close(logits(model), trained)
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    whole = {name for name in after if name.startswith(tuple(HEADS[family]))}
    assert whole <= moved, "every weight of the head is trained"
    assert moved - whole <= {f"{name}.weight" for name in names}


def test_a_head_that_is_rounded_is_trained_too_and_saved_without_its_scales(tmp_path: Path) -> None:
    model = classifier("bert")
    prepare_qat(model, weight=QuantSpec(8, observer="lsq"))
    attach(model, target_layers(model), Adapter(rank=4, alpha=8))
    train(model)
    trained = model.classifier.weight.detach().clone()
    save_adapter(model, tmp_path)
    theirs: Any = PeftModel.from_pretrained(classifier("bert", 5), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(theirs.base_model.model.classifier.modules_to_save["default"].weight, trained)
    assert not torch.equal(trained, classifier("bert").classifier.weight)


def test_a_pattern_of_the_head_alone_and_its_held_zeros_are_refused() -> None:
    model = classifier("llama")
    with pytest.raises(QatkitError, match=r"'score' matches no linear layer .*\['score'\] is trained in full"):
        target_layers(model, ["score"])
    with pytest.raises(
        QatkitError, match=r"held: layer 'score' has a sparsity mask, but LoRA trains the classification head"
    ):
        attach(model, target_layers(model), Adapter(), held=["score"])
    assert all(parameter.requires_grad for parameter in model.parameters())


RECIPE = """
name: classified
model: {{factory: "qatkit.models:sequence_classifier", args: {{name_or_path: {folder}/bert, num_classes: 3}}}}
data:
  factory: "qatkit.data:text_classification"
  args:
    source: {{path: {folder}/records.jsonl, val_fraction: 0.2, test_fraction: 0.2}}
    tokenizer: {folder}/tokenizer
    classes: [a, b, c]
    context: 48
trainer: {{accelerator: cpu}}
stages:
  lora: {{max_steps: 12, batch_size: 8, lr: 1.0e-2, lora: {{rank: 4, alpha: 8}}}}
  more: {{max_steps: 1, batch_size: 8, lr: 1.0e-2, lora: {{rank: 4, alpha: 8}}}}
"""


def test_a_recipe_on_a_body_without_a_head_leaves_a_folder_that_peft_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny("bert", "MaskedLM", vocab_size=302).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "tokenizer", mask_token="<mask>", pad_token="<pad>")
    records = [{"text": text, "label": "abc"[len(text) % 3]} for text in SENTENCES]
    write_lines(tmp_path / "records.jsonl", records)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    run = Run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    run_stages(run)
    torch.manual_seed(99)  # a head of the reader's own
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3)
    theirs = PeftModel.from_pretrained(base, run.folder("lora") / "adapter")
    torch.testing.assert_close(logits(theirs), logits(run.load_model("lora")))
    named = [
        json.loads((run.folder(stage) / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        for stage in ("lora", "more")
    ]
    assert named == [str(tmp_path / "bert"), ""], "what the first stage trained is not the model of that name any more"
