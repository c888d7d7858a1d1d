"""KnowledgeDistillation in a user's LightningModule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit import QatkitError, QuantSpec
from tests.callbacks.modules import Classifier, batches, network, trainer


def teacher() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))


class ByHand(Classifier):
    """The same training, written out by a user who knows the formula."""

    teacher = teacher()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        logits = self(batch[0])
        with torch.no_grad():
            target = F.softmax(self.teacher(batch[0]) / 4.0, dim=-1)
        divergence = F.kl_div(F.log_softmax(logits / 4.0, dim=-1), target, reduction="batchmean")
        return 0.7 * 16 * divergence + 0.3 * F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("student", [None, "net"])
def test_training_equals_that_of_the_formula_written_by_hand(student: str | None) -> None:
    ours, by_hand = Classifier(), ByHand()
    trainer(KnowledgeDistillation(teacher(), temperature=4.0, alpha=0.7, student=student)).fit(ours, batches())
    trainer().fit(by_hand, batches())
    for ours_weight, by_hand_weight in zip(ours.parameters(), by_hand.net.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, by_hand_weight, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ours_weight, dict(Classifier().named_parameters())["net.0.weight"])


def test_the_teacher_is_neither_registered_nor_trained_nor_saved() -> None:
    module, model = Classifier(), teacher()
    before = copy.deepcopy(model.state_dict())
    fit = trainer(KnowledgeDistillation(model))
    fit.fit(module, batches())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(module.state_dict()) == set(Classifier().state_dict())
    assert not any(part is model for part in module.modules())


def test_after_training_the_module_is_as_the_user_wrote_it() -> None:
    module = Classifier()
    trainer(KnowledgeDistillation(teacher(), student="net")).fit(module, batches())
    assert "training_step" not in module.__dict__
    assert not module.net._forward_hooks


def test_it_works_beside_quantization_whichever_comes_first() -> None:
    results = []
    for order in (1, -1):
        module = Classifier()
        callbacks = [
            QuantizationAwareTraining(QuantSpec(4, observer="lsq"), QuantSpec(symmetric=False, strategy="tensor")),
            KnowledgeDistillation(network(), alpha=0.5, student="net"),
        ]
        trainer(*callbacks[::order]).fit(module, batches())
        results.append(module.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_a_training_step_that_returns_a_dict_keeps_its_other_entries() -> None:
    class WithDict(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "note": 7}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert outputs["note"] == 7

    trainer(KnowledgeDistillation(teacher())).fit(WithDict(), batches())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: KnowledgeDistillation(m.net, student="net"), "teacher: the teacher is part of the module"),
        (lambda m: KnowledgeDistillation(m.net), "teacher: the teacher is part of the module being trained"),
        (
            lambda m: KnowledgeDistillation(teacher(), student="model"),
            r"'model' is not a submodule; .* one of \['net'\]",
        ),
        (lambda m: KnowledgeDistillation(teacher(), temperature=0.0), "temperature: 0.0 is out of range"),
        (lambda m: KnowledgeDistillation(teacher(), alpha=1.5), "alpha: 1.5 is out of range"),
    ],
)
def test_a_mistake_is_refused_with_advice(make: Any, message: str) -> None:
    module = Classifier()
    with pytest.raises(QatkitError, match=message):
        trainer(make(module)).fit(module, batches())


def test_a_student_that_training_step_never_calls_is_an_error() -> None:
    class Direct(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])  # not through the module's own forward

    with pytest.raises(QatkitError, match=r"never called 'Direct', .* one of \['net'\]"):
        trainer(KnowledgeDistillation(teacher())).fit(Direct(), batches())


def test_an_error_in_fit_leaves_the_module_as_it_was_and_the_callback_usable() -> None:
    class Breaking(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise RuntimeError("broken")

    broken, distil = Breaking(), KnowledgeDistillation(teacher(), student="net")
    with pytest.raises(RuntimeError, match="broken"):
        trainer(distil).fit(broken, batches())
    assert "training_step" not in broken.__dict__
    assert not broken.net._forward_hooks
    distilled, plain = Classifier(), Classifier()
    trainer(distil).fit(distilled, batches())
    trainer().fit(plain, batches())
    assert not torch.equal(distilled.net[0].weight, plain.net[0].weight)


def test_a_teacher_follows_a_bf16_module() -> None:
    trainer(KnowledgeDistillation(teacher(), student="net"), precision="bf16-true").fit(Classifier(), batches())
