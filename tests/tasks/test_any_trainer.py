"""Every task in somebody else's LightningModule and loader: quantized, distilled, exported and verified by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QuantSpec
from qatkit.export.dense import export_dense
from qatkit.export.verification import verify
from qatkit.models import llama
from qatkit.quantization.prepare import qat_layers
from qatkit.tasks import TASKS
from tests.callbacks.modules import Classifier, trainer
from tests.tasks import sets

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]


class Foreign(Classifier):
    """Trains any network with any loss."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__(net)
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(self, batch)


def rows(make: Callable[[int, int], Any]) -> list[Any]:
    """Two batches of a task's training data, without its declaration."""
    data = make(8, 0)
    data.setup("fit")
    return [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]


def masked(batch: Batch) -> Batch:
    return batch | {"labels": batch["labels"].masked_fill(batch["input_ids"] % 2 == 0, -100)}


def without(batch: Batch, *names: str) -> Batch:
    return {name: value for name, value in batch.items() if name not in names}


def matched(model: nn.Module, batch: Batch) -> Tensor:
    """Contrastive loss of mean-pooled hidden states."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.mean(1)
    first, second = F.normalize(hidden, dim=-1).chunk(2)
    return F.cross_entropy(first @ second.T, batch["labels"])


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a transformers model."""
    loss: Tensor = model(**without(batch, "task", "pooling")).loss
    return loss


def classes() -> Iterable[Batch]:
    return [[x, y[:, 0].long()] for x, y in rows(sets.labels)]


def texts() -> Iterable[Batch]:
    return [batch | {"labels": batch["input_ids"][:, 0] % 2} for batch in rows(sets.words)]


def tokens() -> Iterable[Batch]:
    return [batch | {"labels": batch["input_ids"]} for batch in rows(sets.words)]


def heads(name: str) -> Callable[[], nn.Module]:
    return lambda: sets.bert(name)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Iterable[Batch]], Loss, dict[str, Any]]] = {
    "classification": (lambda: sets.dense_net(2), classes, cross_entropy, {}),
    "multilabel": (
        lambda: sets.dense_net(3), lambda: rows(sets.labels),
        lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0]), batch[1]), {"loss": "binary_kl"},
    ),
    "regression": (
        lambda: sets.dense_net(2), lambda: rows(sets.values),
        lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), {"loss": "mse"},
    ),
    "segmentation": (sets.pixel_net, lambda: rows(sets.pixels), cross_entropy, {"class_dim": 1}),
    "detection": (
        sets.detector, sets.boxes, own_loss,
        {"outputs": ["logits", "pred_boxes"], "loss": {"logits": "kl", "pred_boxes": "mse"}},
    ),
    "text_classification": (heads("ForSequenceClassification"), texts, own_loss, {}),
    "token_classification": (heads("ForTokenClassification"), lambda: rows(sets.words), own_loss, {}),
    "question_answering": (
        heads("ForQuestionAnswering"), lambda: rows(sets.spans), own_loss, {"outputs": ["start_logits", "end_logits"]},
    ),
    "causal": (lambda: llama(20, 32, 1, 2, 1, 32, tie_embeddings=False), tokens, own_loss, {}),
    "seq2seq": (sets.t5, lambda: rows(sets.counts), own_loss, {"loss": "jsd"}),
    "masked": (heads("ForMaskedLM"), lambda: map(masked, tokens()), own_loss, {}),
    "pairs": (heads("Model"), lambda: rows(sets.partners), matched, {"loss": "cosine"}),
}  # fmt: skip
TIED = {"seq2seq": ["*lm_head"], "masked": ["*decoder"]}  # layers whose weight is that of an embedding


def test_every_task_of_the_table_has_a_case() -> None:
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("task", CASES)
def test_a_task_is_quantized_and_distilled_by_callbacks_then_exported_and_verified(task: str, tmp_path: Path) -> None:
    make, data, loss, options = CASES[task]
    torch.manual_seed(0)
    net = make()
    module = Foreign(copy.deepcopy(net), loss)
    batches = list(data())
    callbacks = [
        QuantizationAwareTraining(QuantSpec(4), QuantSpec(8, strategy="tensor"), exclude=TIED.get(task, [])),
        KnowledgeDistillation(net, student="net", alpha=0.5, **options),
    ]
    fit = trainer(*callbacks, max_steps=2)
    fit.fit(module, DataLoader(batches, batch_size=None))
    distilled = float(fit.callback_metrics["train/kd_loss"])
    assert 0 < distilled < float("inf")
    assert any(not torch.equal(weight, module.net.get_parameter(name)) for name, weight in net.named_parameters())
    export_dense(module.net, tmp_path / "model.safetensors")
    checked = verify(module.net, tmp_path / "model.safetensors", batches, task=task)
    assert checked.passed, checked.failures
    assert (checked.task, checked.metric) == (task, TASKS[task].metric)
    assert checked.layers == len(list(qat_layers(module.net))) > 0
    assert checked.agreement is not None
    assert checked.agreement > 0.5  # the file does not quantize the inputs of its layers
