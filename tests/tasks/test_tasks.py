"""What a batch asks of a model: against the losses of transformers and numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qatkit import QatkitError
from qatkit.common.labels import IGNORED
from qatkit.tasks import answers, call, evaluate, task_of, to_logits, token_loss
from tests.support.texts import VOCAB, loader, texts, tiny_llama


def test_the_loss_of_a_text_is_that_of_transformers() -> None:
    model, batch = tiny_llama(), texts()
    with torch.no_grad():
        loss, count = token_loss(*answers(call(model, batch), batch))
        assert float(loss) == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert int(count) == int((batch["labels"][:, 1:] != IGNORED).sum()) == sum(row * 11 // 7 for row in range(8))


def test_the_loss_is_computed_in_float32_whatever_the_logits_are() -> None:
    logits, labels = torch.randn(50, VOCAB).bfloat16(), torch.randint(VOCAB, (50,))
    loss, _ = token_loss(logits, labels)
    expected = nn.functional.cross_entropy(logits.double(), labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_text_without_a_label_that_counts_has_a_loss_of_zero_and_a_graph() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss, count = token_loss(logits, torch.full((3,), IGNORED))
    loss.backward()  # type: ignore[no-untyped-call]
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_metrics_of_texts_count_every_token_once_in_whatever_batches(batch_size: int) -> None:
    model, batch = tiny_llama(), texts()
    found = evaluate(model, loader(batch_size))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = float(model(**batch).loss)
    labels = batch["labels"][:, 1:]
    right = (logits.argmax(-1) == labels)[labels != IGNORED].double().mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float(right), abs=1e-12)


def test_a_pair_is_a_classification() -> None:
    model = nn.Identity()
    batches = [(torch.eye(4), torch.tensor([0, 1, 2, 0])), (torch.eye(4)[:1], torch.tensor([0]))]
    found = evaluate(model, batches)
    assert found["accuracy"] == pytest.approx(4 / 5, abs=1e-7)
    assert found["loss"] == pytest.approx(math.log(math.e + 3) - 4 / 5, rel=1e-6)
    assert task_of(batches[0]).name == "classification"


def test_a_mapping_with_a_label_per_sample_is_a_classification_too() -> None:
    class Classifier(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": torch.eye(4)[input_ids]}

    batch = {"input_ids": torch.tensor([0, 1, 2, 3]), "labels": torch.tensor([0, 1, 1, 1])}
    found = evaluate(Classifier(), [batch])
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(math.log(math.e + 3) - 0.5)


def test_logits_are_found_in_what_models_return() -> None:
    logits = torch.zeros(1)
    assert to_logits(logits) is to_logits({"logits": logits}) is to_logits(SimpleNamespace(logits=logits))
    message = r"model: the model returned dict without logits; return a tensor, or an object with \.logits"
    with pytest.raises(QatkitError, match=message):
        to_logits({"loss": logits})


def test_batches_that_cannot_be_scored_say_why() -> None:
    with pytest.raises(QatkitError, match=r"data: a batch has the keys \['input_ids'\], but no 'labels'"):
        answers(torch.zeros(1, 2, 3), {"input_ids": torch.zeros(1, 2)})
    with pytest.raises(QatkitError, match=r"labels of shape \[1, 4\] do not match logits of shape \[1, 2, 3\]"):
        answers(torch.zeros(1, 2, 3), {"labels": torch.zeros(1, 4)})
