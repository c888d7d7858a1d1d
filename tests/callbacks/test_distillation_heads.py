"""Distillation of models with several outputs: detection heads, and encoder-decoders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from qatkit.callbacks.features import HiddenMatch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit import QatkitError, QuantSpec
from qatkit.distillation.features import hidden_mse_loss
from qatkit.distillation.losses import kd_loss, mse_loss
from qatkit.export.dense import export_dense
from qatkit.export.verification import verify
from tests.callbacks.modules import Classifier, trainer
from tests.export.test_any_outputs import BestScore
from tests.tasks import sets

IMAGES = [torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
TARGETS = [{"boxes": torch.rand(16, 4), "labels": torch.arange(16) % 3} for _ in IMAGES]
WEIGHTED = {"heads.boxes": 0.2, "heads.scores.0": 1.0}


class Detector(nn.Module):
    """Takes a list of images, and returns the decoded boxes and the outputs of its heads, as YOLO does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.boxes, self.scores = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, images: list[Tensor]) -> dict[str, Any]:
        hidden = self.body(torch.stack(images)).relu().flatten(2).mT
        boxes, scores = self.boxes(hidden), self.scores(hidden)
        found = [{"boxes": box, "scores": score.amax(1)} for box, score in zip(boxes, scores, strict=True)]
        return {"found": found, "heads": {"boxes": boxes, "scores": [scores]}}


class Detection(Classifier):
    """Somebody else's detection module."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, targets = batch
        heads = self.net(images)["heads"]
        boxes, labels = (torch.stack([target[name] for target in targets]) for name in ("boxes", "labels"))
        return F.l1_loss(heads["boxes"], boxes) + F.cross_entropy(heads["scores"][0].flatten(0, 1), labels.flatten())


def loader(*batches: Any) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)


def test_detection_heads_have_their_own_losses_and_weights_and_the_file_is_verified(tmp_path: Path) -> None:
    student, teacher = Detector(1), Detector(2)
    distil = KnowledgeDistillation(
        teacher, student="net", outputs=WEIGHTED, loss={"heads.boxes": "mse", "heads.scores.0": "kl"}
    )
    ours, theirs = student(IMAGES)["heads"], teacher(IMAGES)["heads"]
    expected = 0.2 * mse_loss(ours["boxes"], theirs["boxes"]) + kd_loss(ours["scores"][0], theirs["scores"][0])
    fit = trainer(distil, max_steps=1)
    fit.fit(Detection(copy.deepcopy(student)), loader((IMAGES, TARGETS)))
    assert float(fit.callback_metrics["train/kd_loss"]) == pytest.approx(float(expected), rel=1e-5)
    module = Detection(student)
    quantize = QuantizationAwareTraining(QuantSpec(4), QuantSpec(8, strategy="tensor"))
    trainer(quantize, distil, max_steps=2).fit(module, loader((IMAGES, TARGETS), (IMAGES[:1], TARGETS[:1])))
    export_dense(module.net, tmp_path / "model.safetensors")
    checked = verify(
        module.net, tmp_path / "model.safetensors", [(IMAGES, TARGETS)],
        forward=lambda model, batch: model(batch[0])["found"], metric=BestScore(),
    )  # fmt: skip
    assert checked.passed, checked.failures
    assert checked.layers == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": {"boxes": "mse"}},
            r"loss: this mapping lists the outputs \['boxes'\], but the compared outputs are \[\]; use the same",
        ),
        (
            {"loss": {"boxes": "mse"}, "outputs": WEIGHTED},
            r"loss: this mapping lists the outputs \['boxes'\], but the compared outputs are \['heads\.b",
        ),
        ({"loss": {"a": "mes"}, "outputs": ["a"]}, r"loss: unknown distillation loss 'mes'; did you mean 'mse'"),
    ],
)
def test_losses_of_other_outputs_than_the_compared_ones_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QatkitError, match=f"^{message}"):
        KnowledgeDistillation(nn.Linear(8, 3), **options)


@pytest.mark.parametrize("path", ["heads.scores.1", "heads.boxes.0", "found.9.boxes", "head.boxes"])
def test_a_path_that_leads_to_no_tensor_is_refused(path: str) -> None:
    distil = KnowledgeDistillation(Detector(2), student="net", outputs=[path], loss="mse")
    with pytest.raises(
        QatkitError, match=rf"^outputs: the model returned a dict with .*, which contains no tensor at \['{path}"
    ):
        trainer(distil, max_steps=1).fit(Detection(Detector(1)), loader((IMAGES, TARGETS)))


class Translation(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.net(**batch).loss


def test_the_padding_of_the_input_text_does_not_mask_an_output_text_of_the_same_length() -> None:
    torch.manual_seed(0)
    student, teacher = sets.t5().eval(), sets.t5().eval()  # without dropout
    tokens = torch.randint(2, sets.WORDS, (2, 6))
    read = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    written = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": read, "decoder_attention_mask": written, "labels": tokens}
    ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    outputs = kd_loss(ours.logits, theirs.logits, mask=written.bool())
    features = [
        hidden_mse_loss(getattr(ours, name)[-1], getattr(theirs, name)[-1], mask.bool()) / 2
        for name, mask in (("encoder_hidden_states", read), ("decoder_hidden_states", written))
    ]
    layers = {f"{part}.final_layer_norm": f"{part}.final_layer_norm" for part in ("encoder", "decoder")}
    fit = trainer(KnowledgeDistillation(teacher, student="net", hidden=HiddenMatch(layers)), max_steps=1)
    module = Translation(student)
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    fit.fit(module, loader(batch))
    assert float(fit.callback_metrics["train/kd_loss"]) == pytest.approx(float(outputs), rel=1e-4)
    assert float(fit.callback_metrics["train/feature_loss"]) == pytest.approx(float(sum(features)), rel=1e-4)
