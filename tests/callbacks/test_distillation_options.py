"""Losses, outputs, features and counted positions of KnowledgeDistillation in a user's LightningModule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from qatkit.callbacks.features import AttentionMatch, HiddenMatch
from qatkit.callbacks.positions import counted_positions, is_causal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from qatkit import QatkitError, QuantSpec
from qatkit.distillation.losses import jsd_loss, kd_loss, mse_loss, reverse_kl_loss
from tests.callbacks.modules import Classifier, batches, network, trainer


def teacher(width: int = 32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))


def first_loss(module: Any, distil: KnowledgeDistillation, data: Any = None) -> tuple[float, Tensor]:
    """The distillation term of the first step, and the loss that was trained."""
    fit = trainer(distil, max_steps=1)
    total: list[Tensor] = []
    backward = module.on_before_backward

    def on_before_backward(loss: Tensor) -> None:
        total.append(loss.detach().clone())
        backward(loss)

    module.on_before_backward = on_before_backward
    fit.fit(module, data if data is not None else batches())
    return fit.callback_metrics["train/kd_loss"].item(), total[0]


LOSSES = {
    "kl": lambda s, t: kd_loss(s, t, 2.0),
    "reverse_kl": lambda s, t: reverse_kl_loss(s, t, 2.0),
    "jsd": lambda s, t: jsd_loss(s, t, 2.0, beta=0.3),
    "mse": mse_loss,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_that_of_its_function(loss: Any) -> None:
    x = batches().dataset[:16][0]
    expected = LOSSES[loss](network()(x), teacher()(x)).item()
    found, _ = first_loss(Classifier(), KnowledgeDistillation(teacher(), 2.0, loss=loss, beta=0.3))
    assert found == pytest.approx(expected, rel=1e-5)


class Heads(nn.Module):
    """Returns several heads, in a dict or a tuple."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.start, self.end = kind, nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        start, end = self.start(x), self.end(x)
        return {"start": start, "end": end} if self.kind == "dict" else (start, end)


@pytest.mark.parametrize(
    ("kind", "outputs", "weights"),
    [
        ("dict", ["start", "end"], (0.5, 0.5)),
        ("tuple", [0, 1], (0.5, 0.5)),
        ("dict", {"start": 2.0, "end": 0.25}, (2.0, 0.25)),
        ("tuple", {1: 3.0}, (0.0, 3.0)),
    ],
)
def test_several_heads_are_averaged_or_weighted(kind: str, outputs: Any, weights: tuple[float, float]) -> None:
    class Module(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            found = self(batch[0])
            return F.cross_entropy(found["start"] if kind == "dict" else found[0], batch[1])

    student, model = Heads(kind, 1), Heads(kind, 2)
    x = batches().dataset[:16][0]
    expected = sum(
        weight * kd_loss(getattr(student, head)(x), getattr(model, head)(x)).item()
        for head, weight in zip(("start", "end"), weights, strict=True)
    )
    found, _ = first_loss(Module(copy.deepcopy(student)), KnowledgeDistillation(model, outputs=outputs, student="net"))
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(
        QatkitError, match=rf"the model returned .*{kind}.*, which contains no tensor at .*; pass outputs=\[...\]"
    ):
        first_loss(Module(student), KnowledgeDistillation(model, student="net"))


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            initializer_range=0.5,
        )
    ).train()


class LanguageModel(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.net(**batch).loss


def sentences() -> dict[str, Tensor]:
    tokens = torch.randint(1, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    present = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    labels = tokens.masked_fill(present == 0, -100)
    labels[:, :3] = -100  # the question; the answer starts at position 3
    return {"input_ids": tokens, "attention_mask": present, "labels": labels}


def test_a_causal_language_model_is_taught_where_the_next_token_is_an_answer() -> None:
    batch, student, model = sentences(), llama(1), llama(2).eval()
    # logits at position 2 predict the first token of the answer, those at the last token of a sentence predict nothing
    rows, places = [0, 0, 1, 1, 1, 1], [2, 3, 2, 3, 4, 5]
    expected = kd_loss(student(**batch).logits[rows, places], model(**batch).logits[rows, places], 2.0)
    data = DataLoader([batch], batch_size=None)
    found, _ = first_loss(LanguageModel(student), KnowledgeDistillation(model, 2.0, student="net"), data)
    assert is_causal(model)
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_shift_positions_count_where_their_own_label_does() -> None:
    logits, batch = torch.zeros(2, 7, 29), sentences()
    everywhere = counted_positions(logits, batch["labels"], batch["attention_mask"], causal=False)
    assert everywhere is not None
    assert torch.equal(everywhere, batch["labels"] != -100)
    padding = counted_positions(logits, None, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), causal=True)
    assert padding is not None
    assert padding.tolist() == [[False, False, True, True, True, True, False], [True] * 6 + [False]]
    assert counted_positions(logits, torch.zeros(2), None, causal=True) is None  # labels of something else


def test_labels_in_a_tuple_leave_positions_out() -> None:
    class Ignoring(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    x, y = batches().dataset[:16]
    y = y.clone()
    y[::3] = -100
    expected = kd_loss(network()(x), teacher()(x), labels=y).item()
    found, _ = first_loss(Ignoring(), KnowledgeDistillation(teacher()), DataLoader([[x, y]], batch_size=None))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(kd_loss(network()(x), teacher()(x)).item(), rel=1e-3)


def test_self_distillation_teaches_with_the_model_as_it_was_before_quantization() -> None:
    original = network()

    def fit(*callbacks: Any) -> dict[str, Tensor]:
        module = Classifier()
        trainer(*callbacks).fit(module, batches())
        return module.state_dict()

    def quantization() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(QuantSpec(num_bits=3, observer="lsq"))

    from_self = fit(KnowledgeDistillation("self", alpha=1.0), quantization())
    given = fit(KnowledgeDistillation(original, alpha=1.0, student="net"), quantization())
    assert all(torch.equal(value, given[key]) for key, value in from_self.items())
    with pytest.raises(QatkitError, match=r"the module is already quantized, .* put KnowledgeDistillation before"):
        fit(quantization(), KnowledgeDistillation("self"))


def test_a_ramp_raises_the_weight_of_the_teacher() -> None:
    distil = KnowledgeDistillation(teacher(), alpha=0.8, ramp=0.5)
    losses: list[list[float]] = []

    class Watching(Classifier):
        def on_before_backward(self, loss: Tensor) -> None:
            metrics = self.trainer.callback_metrics
            losses.append([loss.item(), metrics["train/kd_loss"].item(), metrics["train/label_loss"].item()])

    trainer(distil).fit(Watching(), batches())
    for step, (total, divergence, label) in enumerate(losses):
        alpha = 0.8 * min(1, step / 8 / 0.5)
        assert total == pytest.approx(alpha * divergence + (1 - alpha) * label, rel=1e-5)


def test_hidden_states_of_another_width_are_compared_through_learned_maps_that_resume(tmp_path: Path) -> None:
    def distil() -> KnowledgeDistillation:
        return KnowledgeDistillation(
            teacher(24), student="net", hidden=HiddenMatch({"1": "1"}, weight=2.0, widths=(16, 24))
        )

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)]

    # one batch over and over: which batch Lightning goes on with after a resume is its own affair
    data = DataLoader([batches().dataset[:16]] * 8, batch_size=None)
    whole, callback = Scheduled(), distil()
    callback.features.attach(network(), teacher(24))
    start = copy.deepcopy(callback.features.projections)
    assert start is not None
    fit = trainer(callback)
    fit.fit(whole, data)
    trained = callback.features.projections
    assert trained is not None
    assert not torch.equal(trained.maps[0].weight, start.maps[0].weight)
    assert set(whole.state_dict()) == set(Classifier().state_dict())
    half, first = Scheduled(), trainer(distil(), max_steps=4)
    first.fit(half, data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = Scheduled(), distil()
    trainer(again).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert again.features.projections is not None
    assert torch.equal(again.features.projections.maps[0].weight, trained.maps[0].weight)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_features_are_added_to_the_loss_with_their_weights() -> None:
    x, y = batches().dataset[:16]
    student, model = network(), teacher(16)
    hidden = F.mse_loss(student[:2](x), model[:2](x))
    expected = 0.5 * kd_loss(student(x), model(x)) + 0.5 * F.cross_entropy(student(x), y) + 3.0 * hidden
    distil = KnowledgeDistillation(model, student="net", hidden=HiddenMatch({"1": "1"}, weight=3.0))
    _, total = first_loss(Classifier(student), distil)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_relations_of_values_are_taught_to_a_language_model() -> None:
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    attention = AttentionMatch({name: name for name in names}, weight=100.0, heads=4)
    module, batch = LanguageModel(llama(1)), sentences()
    distil = KnowledgeDistillation(llama(2), alpha=0.0, student="net", attention=attention)
    fit = trainer(distil, max_steps=30)
    before = trainer(copy.deepcopy(distil), max_steps=1)
    data = DataLoader([batch] * 30, batch_size=None)
    before.fit(copy.deepcopy(module), data)
    fit.fit(module, data)
    first = before.callback_metrics["train/feature_loss"].item()
    assert 0 < fit.callback_metrics["train/feature_loss"].item() < 0.7 * first


def test_nan_in_teacher_outputs_names_the_batch() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = teacher(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * (torch.nan if self.calls == 4 else 1)

    with pytest.raises(QatkitError, match=r"outputs for training batch 3 \(counting from 0\) contain NaN"):
        trainer(KnowledgeDistillation(Sometimes())).fit(Classifier(), batches())


def test_a_teacher_that_the_optimizer_trains_is_refused() -> None:
    model = teacher()

    class Both(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([*self.parameters(), *model.parameters()])

    with pytest.raises(QatkitError, match=r"teacher: the optimizer trains the teacher's parameter '0.weight'"):
        trainer(KnowledgeDistillation(model)).fit(Both(), batches())
    tied = teacher(16)
    tied[0].weight = (module := Classifier()).net[0].weight
    with pytest.raises(QatkitError, match=r"teacher: the optimizer trains the teacher's parameter '0.weight'"):
        trainer(KnowledgeDistillation(tied)).fit(module, batches())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnowledgeDistillation(nn.Linear(8, 4)), r"shape \[16, 4\], the student's \[16, 3\].*vocab_size=len"),
        (lambda: KnowledgeDistillation(teacher(), vocab_size=4), r"vocab_size: 4 exceeds"),
        (
            lambda: KnowledgeDistillation(teacher(), loss="l2"),
            "loss: unknown distillation loss 'l2'; did you mean 'kl'",
        ),
        (lambda: KnowledgeDistillation("model"), "teacher: 'model' is not a model; .* or 'self'"),
        (lambda: KnowledgeDistillation(teacher(), outputs="logits"), r"use \['logits'\]"),
        (lambda: KnowledgeDistillation(teacher(), outputs=[]), "outputs: the list is empty"),
        (lambda: KnowledgeDistillation(teacher(), outputs={"a": -1.0}), "outputs: the weight of 'a' is -1.0"),
        (lambda: KnowledgeDistillation(teacher(), ramp=2.0), "ramp: 2.0 is out of range"),
        (
            lambda: KnowledgeDistillation(teacher(), hidden=HiddenMatch({"net.7": "0"})),
            r"hidden.layers: 'net.7' matches no submodule of the student; did you mean 'net.2'",
        ),
        (
            lambda: KnowledgeDistillation(teacher(), hidden=HiddenMatch({"net.1": "1"})),
            r"hidden.widths: None does .* 'net.1' of the student, .* \[16, 16\], and '1' of the teacher, .* \[16, "
            r"32\]; "
            r"use widths=\(16, 32\)",
        ),
        (lambda: HiddenMatch({}), "hidden.layers: {} maps no layers"),
        (lambda: AttentionMatch({"a": "b"}, weight=0.0), "attention.weight: 0.0 is out of range"),
    ],
)
def test_a_mistake_is_refused_with_advice(make: Any, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        trainer(make()).fit(Classifier(), batches())


def test_regressions_are_compared_by_their_numbers() -> None:
    class Regression(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return F.mse_loss(self(batch[0]), batch[0][:, :1])

    with pytest.raises(QatkitError, match=r"outputs of shape \[16, 1\] have fewer than two classes; use loss='mse'"):
        trainer(KnowledgeDistillation(nn.Linear(8, 1))).fit(Regression(nn.Linear(8, 1)), batches())
    trainer(KnowledgeDistillation(nn.Linear(8, 1), loss="mse")).fit(Regression(nn.Linear(8, 1)), batches())


def test_padded_vocabularies_are_trimmed() -> None:
    x = batches().dataset[:16][0]
    wide = nn.Linear(8, 5)
    expected = kd_loss(network()(x)[:, :2], wide(x)[:, :2]).item()
    found, _ = first_loss(Classifier(), KnowledgeDistillation(wide, vocab_size=2))
    assert found == pytest.approx(expected, rel=1e-5)
