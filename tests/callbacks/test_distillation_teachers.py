"""Which teachers KnowledgeDistillation takes, layers named by globs, and every kind of callback in one Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import (
    AttentionMatch,
    HiddenMatch,
    KnowledgeDistillation,
    MagnitudePruning,
    QuantizationAwareTraining,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QatkitError, QuantSpec
from qatkit.distillation.cache import CachedTeacher, cache_teacher
from qatkit.distillation.losses import kd_loss
from qatkit.quantization.prepare import fake_quantizers
from tests.callbacks.modules import Classifier, batches, network, trainer


class Stack(nn.Module):
    """Some layers of one width, and a classifier."""

    def __init__(self, depth: int, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.head(x)
        return answer


def states(model: Stack, x: Tensor) -> list[Tensor]:
    found = []
    for layer in model.layers:
        x = layer(x)
        found.append(x)
    return found


def features_of_first_step(distil: KnowledgeDistillation, student: nn.Module) -> float:
    fit = trainer(distil, max_steps=1)
    fit.fit(Classifier(copy.deepcopy(student)), batches())
    return float(fit.callback_metrics["train/feature_loss"])


@pytest.mark.parametrize(("layers_by", "numbers"), [("uniform", [1, 3]), ("last", [2, 3])])
def test_a_glob_compares_every_layer_of_the_student_with_its_layer_of_the_teacher(
    layers_by: Any, numbers: list[int]
) -> None:
    student, model, x = Stack(2, 1), Stack(4, 2), batches().dataset[:16][0]
    expected = sum(
        F.mse_loss(ours, states(model, x)[number]) for ours, number in zip(states(student, x), numbers, strict=True)
    ) / len(numbers)
    hidden = HiddenMatch({"layers.*": "layers.*"}, layers_by=layers_by)
    found = features_of_first_step(KnowledgeDistillation(model, student="net", hidden=hidden), student)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_learned_maps_are_as_many_as_the_layers_that_a_glob_matches() -> None:
    hidden = HiddenMatch({"layers.*": "layers.*"}, widths=(8, 12))

    class Wider(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 4)))

    distil = KnowledgeDistillation(Wider(4, 2, width=12), student="net", hidden=hidden)
    features_of_first_step(distil, Stack(3, 1))
    assert distil.features.projections is not None
    assert [tuple(part.weight.shape) for part in distil.features.projections.maps] == [(12, 8)] * 3


def test_a_cache_of_a_classifier_holds_the_hidden_states_that_a_glob_names(tmp_path: Path) -> None:
    student, model, x = Stack(2, 1), Stack(4, 2), batches().dataset.tensors[0]

    def answer(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return model(batch), {f"layers.{number}": states(model, batch)[number] for number in range(4)}

    cache_teacher(answer, x.split(32), tmp_path, {}, k=2)
    hidden = HiddenMatch({"layers.*": "layers.*"})
    live, cached = (
        features_of_first_step(KnowledgeDistillation(teacher, student="net", hidden=hidden), student)
        for teacher in (model, CachedTeacher(tmp_path, {}))
    )
    assert cached == pytest.approx(live, rel=1e-3)
    other = HiddenMatch({"head": "head"})
    with pytest.raises(QatkitError, match=r"'head' matches no submodule of the teacher; use one of layers.0, "):
        features_of_first_step(KnowledgeDistillation(CachedTeacher(tmp_path, {}), student="net", hidden=other), student)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: KnowledgeDistillation(None),
            "teacher: NoneType is not a model; pass a torch.nn.Module, a Teacher, a CachedTeacher or",
        ),  # type: ignore[arg-type]
        (lambda: KnowledgeDistillation(lambda x: x), "teacher: function is not a model"),  # type: ignore[arg-type]
        (
            lambda: KnowledgeDistillation(nn.Linear(5, 3)),
            r"teacher: the teacher fails on the student's inputs \(float32 \[16, 8\]\): .*the same task",
        ),
        (
            lambda: KnowledgeDistillation(Stack(1, 2), hidden=HiddenMatch({"net.0": "layers.0"}, widths=(12, 8))),
            r"hidden.widths: \(12, 8\) does not fit layer 'net.0' of the student, .* \[16, 16\], and 'layers.0' of the "
            r"teacher, .* \[16, 8\]; use widths=\(16, 8\)",
        ),
        (
            lambda: KnowledgeDistillation(Stack(1, 2), hidden=HiddenMatch({"net.*": "layers.*"})),
            r"'net.\*' matches more student layers \(3\) than 'layers.\*' matches teacher layers \(1\); map each",
        ),
        (
            lambda: KnowledgeDistillation(Stack(1, 2), attention=AttentionMatch({"blocks.*": "layers.*"})),
            r"attention.layers: 'blocks.\*' matches no submodule of the student; use one of net, net.0",
        ),
        (
            lambda: KnowledgeDistillation(Stack(1, 2), attention=AttentionMatch({"net.0": "layers.0"})),
            r"attention.heads: None requires feature maps .*, but layer 'net.0' returns \[16, 16\]; use heads=4 for",
        ),
    ],
)
def test_a_mistake_is_refused_with_advice(make: Any, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        trainer(make()).fit(Classifier(), batches())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.ones(2, 5, 4), r"layer 'a' returns \[2, 5, 4\] for logits \[2, 3\], but a cache stores one vector"),
        (torch.full((2, 4), 1e6), r"layer 'a' returns values up to 1e\+06, but a cache stores float16"),
    ],
)
def test_states_that_a_cache_cannot_hold_are_refused(state: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match=message):
        cache_teacher(lambda batch: (torch.zeros(2, 3), {"a": state}), [torch.ones(2, 1)], tmp_path, {}, k=1)


def test_a_teacher_a_quantization_and_a_pruning_train_one_model_together() -> None:
    module = Classifier()
    model = network()
    prune = MagnitudePruning(0.5)
    quantize = QuantizationAwareTraining(QuantSpec(4, observer="lsq"))
    distil = KnowledgeDistillation(model, temperature=2.0, alpha=1.0, student="net")
    data = DataLoader(batches().dataset, batch_size=16)
    fit = trainer(prune, quantize, distil, max_steps=8)
    fit.fit(module, data)
    weights = [module.net[place].weight for place in (0, 2)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == sum(weight.numel() for weight in weights) // 2
    assert fake_quantizers(module)
    x = batches().dataset[:][0]
    untaught = Classifier()
    trainer(MagnitudePruning(0.5), QuantizationAwareTraining(QuantSpec(4, observer="lsq")), max_steps=1).fit(
        untaught, data
    )
    assert kd_loss(module.net(x), model(x), 2.0) < kd_loss(untaught.net(x), model(x), 2.0)
