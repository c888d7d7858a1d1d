"""Positions that do not count reach no gradient in a training step, and dense predictions are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qatkit.callbacks import AttentionMatch, HiddenMatch, KnowledgeDistillation
from qatkit.callbacks.positions import check_class_dimension
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from qatkit import QatkitError
from tests.callbacks.modules import Classifier, trainer

BAD = [torch.inf, -torch.inf, torch.nan]
PRESENT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
CONFIG = LlamaConfig(
    vocab_size=29, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
    initializer_range=0.5,
)  # fmt: skip


def damaged(values: Tensor, mask: Tensor | None, bad: float | None) -> Tensor:
    return values if mask is None or bad is None else torch.where(mask[..., None] == 1, values, bad)


class Teacher(LlamaForCausalLM):
    """Returns a non-finite number in place of its logits, or of its last hidden states, at padding."""

    bad: float | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = damaged(output.logits, kwargs.get("attention_mask"), self.bad)
        return output


class LanguageModel(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.net(**batch).loss


def trained(module: Any, distil: KnowledgeDistillation, batch: dict[str, Tensor]) -> list[Tensor]:
    """The distillation term of the second step, and the weights after it."""
    fit = trainer(distil, max_steps=2)
    fit.fit(module, DataLoader([batch] * 2, batch_size=None))
    return [fit.callback_metrics["train/kd_loss"], *(part.detach() for part in module.state_dict().values())]


def taught_language_model(bad: float | None, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    student = LlamaForCausalLM(CONFIG)
    torch.manual_seed(2)
    teacher = Teacher(CONFIG)
    teacher.bad = bad
    tokens = torch.randint(1, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(PRESENT == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": PRESENT, "labels": labels}
    return trained(LanguageModel(student), KnowledgeDistillation(teacher, 2.0, student="net", **options), batch)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("loss", "fused"), [("kl", False), ("reverse_kl", False), ("mse", False), ("jsd", True)])
def test_training_does_not_depend_on_teacher_outputs_at_padding(loss: str, fused: bool, bad: float) -> None:
    expected = taught_language_model(None, loss=loss, fused=fused)
    actual = taught_language_model(bad, loss=loss, fused=fused)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


class Tapped(nn.Module):
    """A token classifier with a layer whose output nothing else uses."""

    def __init__(self, seed: int, bad: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head, self.bad = nn.Linear(8, 8), nn.Linear(8, 3), bad
        self.tap = nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(x)
        self.tap(damaged(hidden, attention_mask, self.bad))
        logits: Tensor = self.head(hidden)
        return logits


class Tagger(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        logits = self.net(batch["x"], attention_mask=batch["attention_mask"])
        return F.cross_entropy(logits.mT, batch["labels"])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": HiddenMatch({"tap": "tap"})},
        {"hidden": HiddenMatch({"tap": "tap"}, loss="cosine")},
        {"hidden": HiddenMatch({"tap": "tap"}, widths=(8, 8))},
        {"attention": AttentionMatch({"tap": "tap"}, heads=2)},
    ],
    ids=["mse", "cosine", "maps", "relations"],
)
def test_training_does_not_depend_on_features_at_padding(options: dict[str, Any], side: str, bad: float) -> None:
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "attention_mask": PRESENT, "labels": torch.where(PRESENT == 1, 1, -100)}
    runs = []
    for value in (None, bad):
        student, teacher = (
            Tapped(1, value if side == "student" else None),
            Tapped(2, value if side == "teacher" else None),
        )
        distil = KnowledgeDistillation(teacher, student="net", **options)
        runs.append(trained(Tagger(student), distil, batch))
        if distil.features.projections is not None:
            runs[-1] += [part.detach() for part in distil.features.projections.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))


def test_nan_at_a_position_that_counts_is_still_an_error() -> None:
    teacher = Tapped(2)
    nn.init.constant_(teacher.head.bias, torch.nan)
    batch = {"x": torch.zeros(2, 7, 8), "attention_mask": PRESENT, "labels": torch.where(PRESENT == 1, 1, -100)}
    with pytest.raises(QatkitError, match=r"outputs for training batch 0 \(counting from 0\) contain NaN"):
        trained(Tagger(Tapped(1)), KnowledgeDistillation(teacher, student="net"), batch)


class Segmenter(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_dense_prediction_without_its_class_dimension_is_refused(loss: str) -> None:
    data = DataLoader([[torch.randn(4, 1, 5, 7), torch.randint(0, 3, (4, 5, 7))]], batch_size=None)
    message = r"class_dim: logits have shape \[4, 3, 5, 7\], labels \[4, 5, 7\], so dimension 1 is .*class_dim=1"
    distil = KnowledgeDistillation(nn.Conv2d(1, 3, 1), student="net", loss=loss)
    with pytest.raises(QatkitError, match=message):
        trainer(distil, max_steps=1).fit(Segmenter(nn.Conv2d(1, 3, 1)), data)


@pytest.mark.parametrize("extra", [False, True], ids=["labels NHW", "labels N1HW"])
@pytest.mark.parametrize("ignored", [0, 9])
def test_dense_prediction_is_compared_over_its_classes(ignored: int, extra: bool) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
    x, labels = torch.randn(4, 1, 5, 7), torch.randint(0, 3, (4, 5, 7))
    labels.view(-1)[:ignored] = -100
    log_q, log_p = (F.log_softmax(model(x).double(), dim=1) for model in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(1)[labels != -100].mean()

    class Module(Segmenter):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step([batch[0], batch[1].view(4, 5, 7)], batch_idx)

    fit = trainer(KnowledgeDistillation(teacher, alpha=1.0, student="net", class_dim=1), max_steps=1)
    fit.fit(Module(student), DataLoader([[x, labels.unsqueeze(1) if extra else labels]], batch_size=None))
    assert float(fit.callback_metrics["train/kd_loss"]) == pytest.approx(kl.item(), rel=1e-5)
    if not ignored:  # the value of torch.nn.functional.kl_div over dimension 1
        assert kl.item() == pytest.approx(0.25784, abs=1e-5)


def test_a_class_dimension_that_does_not_exist_is_refused() -> None:
    data = DataLoader([[torch.randn(4, 8), torch.randint(0, 3, (4,))]], batch_size=None)
    distil = KnowledgeDistillation(nn.Linear(8, 3), student="net", class_dim=2)
    with pytest.raises(QatkitError, match=r"class_dim: the logits of shape \[4, 3\] have no dimension 2"):
        trainer(distil, max_steps=1).fit(Segmenter(nn.Linear(8, 3)), data)


@pytest.mark.parametrize(
    ("logits", "labels", "compares_classes", "refused"),
    [
        ((4, 3), (4,), True, False),
        ((4, 9, 3), (4, 9), True, False),
        ((4, 3, 9), (4, 9), True, True),
        ((4, 9, 9), (4, 9), True, False),  # a text of as many tokens as there are classes
        ((4, 9, 3), None, True, False),
        ((4, 3, 5, 7), (4, 1, 5, 7), True, True),
        ((4, 5, 7, 3), (4, 5, 7), True, False),
        ((4, 5, 5, 5), (4, 5, 5), True, True),  # either dimension may hold the classes
        ((4, 3, 5, 7), None, True, True),
        ((4, 3, 5, 7), None, False, False),  # an image is compared element by element
        ((4, 3, 5, 6, 7), (4, 5, 6, 7), True, True),
    ],
)
def test_labels_show_which_dimension_holds_the_classes(
    logits: tuple[int, ...], labels: tuple[int, ...] | None, compares_classes: bool, refused: bool
) -> None:
    given = None if labels is None else torch.zeros(labels, dtype=torch.long)
    if not refused:
        check_class_dimension(torch.zeros(logits), given, compares_classes)
        return
    with pytest.raises(QatkitError, match="pass class_dim="):
        check_class_dimension(torch.zeros(logits), given, compares_classes)
