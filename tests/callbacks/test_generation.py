"""On-policy and sequence-level distillation in a user's LightningModule."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from qatkit.callbacks import Generation, KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QatkitError, QuantSpec
from qatkit.models import llama
from tests.callbacks.modules import Classifier, trainer
from tests.support.texts import VOCAB, tiny_llama

PROMPT, NEW = 4, 6
distil = partial(KnowledgeDistillation, student="net")


def student() -> Any:
    model = tiny_llama()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight *= 5  # as it is made, it only repeats the last token
    return model


class Writer(LightningModule):
    """A language model in somebody's module, which keeps the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = student()
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        assert self.training
        assert self.net.training
        self.seen.append(batch)
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def teacher() -> nn.Module:
    torch.manual_seed(5)
    model = llama(VOCAB, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, context=16)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def texts() -> DataLoader[Any]:
    words = torch.randint(1, VOCAB, (16, 12), generator=torch.Generator().manual_seed(1))
    return DataLoader([{"input_ids": row, "labels": row} for row in words], batch_size=4)  # type: ignore[arg-type]


def fit(callback: KnowledgeDistillation, *others: Any, **options: Any) -> tuple[Writer, list[float]]:
    module, losses = Writer(), []
    module.on_before_backward = lambda loss: losses.append(loss.item())  # type: ignore[method-assign]
    torch.manual_seed(9)
    trainer(*others, callback, **({"max_steps": 4} | options)).fit(module, texts())
    return module, losses


def is_generated(batch: dict[str, Tensor]) -> bool:
    return "attention_mask" in batch


@pytest.mark.parametrize("fused", [False, True])
def test_the_student_learns_from_the_teacher_alone_where_it_wrote_itself(fused: bool) -> None:
    own = Generation(prompt=PROMPT, new_tokens=NEW, eos=[7])
    before = student().eval()
    module, losses = fit(distil(teacher(), 2.0, alpha=0.3, on_policy=own, ramp=1.0, fused=fused), max_steps=1)
    batch = module.seen[0]
    assert torch.equal(batch["input_ids"][:, :PROMPT], next(iter(texts()))["input_ids"][:, :PROMPT])
    # the loss of the step, in float64, over the tokens that the student wrote: neither ramp nor alpha nor its own loss
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q, p = ((model(**inputs).logits.double()[:, :-1] / 2).log_softmax(-1) for model in (before, teacher().eval()))
    divergence = (p.exp() * (p - q)).sum(dim=-1)
    counted = batch["labels"][:, 1:] != -100
    assert 0 < counted.sum() <= 4 * NEW
    assert losses[0] == pytest.approx(4 * divergence[counted].mean().item(), rel=1e-5)


def test_the_student_reads_the_teachers_texts_as_if_they_were_data() -> None:
    theirs = Generation(prompt=PROMPT, new_tokens=NEW, temperature=0.0)
    module, losses = fit(distil(teacher(), alpha=0.0, sequence_level=theirs), max_steps=1)
    batch, model = module.seen[0], teacher().eval()
    text = batch["input_ids"][:, :PROMPT]
    with torch.no_grad():
        for _ in range(NEW):  # greedy, without a cache
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = student().eval()(input_ids=text).logits.double()
    assert torch.equal(batch["input_ids"], text)
    expected = F.cross_entropy(logits[:, PROMPT - 1 : -1].flatten(0, 1), text[:, PROMPT:].flatten())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_fraction_of_generated_batches_follows_its_schedule() -> None:
    def late(progress: float) -> float:
        return 1.0 if progress >= 0.5 else 0.0

    own = Generation(late, PROMPT, NEW)
    module, _ = fit(distil(teacher(), on_policy=own), max_steps=8)
    assert [is_generated(batch) for batch in module.seen] == [False] * 4 + [True] * 4
    half = Generation(0.5, PROMPT, 1)
    module, _ = fit(distil(teacher(), on_policy=half), max_steps=64)
    assert 20 < sum(map(is_generated, module.seen)) < 44


def test_the_data_of_other_batches_is_trained_on_as_without_generation() -> None:
    never = Generation(0.0, PROMPT, NEW)
    plain, losses = fit(distil(teacher(), alpha=0.3))
    with_never, same = fit(distil(teacher(), alpha=0.3, on_policy=never, sequence_level=never))
    assert losses == same
    for ours, theirs in zip(plain.parameters(), with_never.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_the_student_writes_depends_on_the_seed_alone_also_after_a_stop(tmp_path: Path) -> None:
    def again(seed: int = 3) -> KnowledgeDistillation:
        return distil(teacher(), alpha=0.5, on_policy=Generation(0.7, PROMPT, NEW, eos=[7], seed=seed))

    whole, losses = fit(again(), max_steps=8)
    saved = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=4)
    fit(again(), saved, max_steps=4, enable_checkpointing=True)
    module = Writer()
    torch.manual_seed(1)  # of no consequence: the texts have random numbers of their own
    trainer(again(), max_steps=8).fit(module, texts(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert any(is_generated(batch) for batch in module.seen)
    first, later = whole.seen[4], module.seen[0]
    assert first.keys() == later.keys()
    assert torch.equal(first["input_ids"], later["input_ids"])
    assert [is_generated(batch) for batch in module.seen] == [is_generated(batch) for batch in whole.seen[4:]]
    assert fit(again(seed=4), max_steps=8)[1] != losses


def test_a_quantized_student_writes_as_it_will_run_and_trains_on() -> None:
    quantize = QuantizationAwareTraining(QuantSpec(2, observer="lsq"), exclude=["*lm_head"])
    own = Generation(prompt=PROMPT, new_tokens=NEW, temperature=0.0)
    module, _ = fit(distil(teacher(), on_policy=own), quantize, max_steps=3)
    assert all(map(is_generated, module.seen))
    assert all(part.training for part in module.modules())
    plain, quantized = fit(distil(teacher(), on_policy=own), max_steps=1)[0].seen[0], module.seen[0]
    assert not torch.equal(plain["input_ids"], quantized["input_ids"]), "two bits must change what is written"


def test_a_text_ends_where_the_models_config_says_and_else_the_tokenizer_of_the_data() -> None:
    model = teacher()
    model.generation_config.eos_token_id = list(range(150, VOCAB))
    theirs = Generation(prompt=PROMPT, new_tokens=NEW)
    module, _ = fit(distil(model, sequence_level=theirs), max_steps=4)
    written = torch.cat([batch["labels"][:, PROMPT:].flatten() for batch in module.seen])
    assert (written == -100).any()
    assert (written >= 150).any()


def test_models_that_cannot_generate_and_values_out_of_range_are_refused() -> None:
    other = copy.deepcopy(Classifier().net)
    own = Generation(prompt=PROMPT)
    with pytest.raises(
        QatkitError, match="on_policy: Classifier cannot generate text; only a transformers causal language model"
    ):
        trainer(KnowledgeDistillation(other, on_policy=own)).fit(Classifier(), texts())
    with pytest.raises(QatkitError, match="sequence_level: Sequential cannot generate text"):
        trainer(distil(other, sequence_level=own)).fit(Writer(), texts())
    with pytest.raises(QatkitError, match=r"fraction: 1\.5 is out of range"):
        Generation(1.5)
    with pytest.raises(QatkitError, match=r"new_tokens: 0 is out of range"):
        Generation(new_tokens=0)
    with pytest.raises(
        QatkitError, match=r"on_policy\.fraction: 0\.6 and sequence_level\.fraction 0\.6 add up to more"
    ):
        KnowledgeDistillation(other, on_policy=Generation(0.6), sequence_level=Generation(0.6))
