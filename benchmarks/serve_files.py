"""Parts of `serve.py`: train a network, quantize it for each runtime, and write its files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from serve_minilm import minilm
from serve_models import FAMILIES, Bert, Family
from serve_network import Network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec, Scheme
from qatkit.data import digits
from qatkit.export.onnx.baselines import quantize as quantize_free
from qatkit.export.onnx.format import export_onnx
from qatkit.export.openvino.format import export_openvino

FILES = ("fp32", "static", "dynamic", "qatkit")
EXPORTS: dict[str, tuple[Callable[..., None], str]] = {
    "ONNX Runtime": (export_onnx, "qatkit.onnx"),
    "OpenVINO": (export_openvino, "openvino.xml"),
}
RUNTIMES = tuple(EXPORTS)


@dataclass(frozen=True)
class Written:
    """The files of a network, and the models that qatkit trained."""

    network: Network
    paths: Mapping[str, Mapping[str, Path]]
    """By runtime and kind."""
    trained: Mapping[str, nn.Module]
    """By runtime."""


class Classifier(LightningModule):
    """A classifier that is trained with Adam and a learning rate that rises and falls."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.2, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def samples(family: Family) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and labels for training and for tests."""
    tokens = family.embeddings is not None
    data = digits(size=8 if tokens else 32, val_fraction=0.1, test_fraction=0.3)
    parts = [part.tensors for part in (data.train, data.test)]  # type: ignore[union-attr]  # tensor data sets
    if not tokens:
        return parts[0], parts[1]
    levels = Bert.LEVELS - 1
    first, second = [((images.flatten(1) * levels).round().long(), labels) for images, labels in parts]
    return first, second


def train(model: nn.Module, family: Family, steps: int, lr: float, callbacks: list[Callback]) -> None:
    """Train a model on the digits."""
    seed_everything(0)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*samples(family)[0]), family.batch, shuffle=True)
    trainer.fit(Classifier(model, lr, steps), loader)
    model.eval()


def classifier(family: Family, quick: bool) -> Network:
    """A network that is trained on scikit-learn's digits."""
    assert family.build is not None
    torch.manual_seed(0)
    dense, (inputs, _), (held_out, labels) = family.build(), *samples(family)
    train(dense, family, 40 if quick else family.dense_steps, family.lr, [])

    def tune(quantization: Callback) -> nn.Module:
        model = copy.deepcopy(dense)
        distill = KnowledgeDistillation(dense, temperature=2.0, alpha=0.9, student="model")
        train(model, family, 10 if quick else family.steps, family.tuning_lr, [quantization, distill])
        return model

    example = {"input_ids": inputs[:2]} if family.embeddings else inputs[:2]
    return Network(dense, example, held_out, inputs[:256].split(64), tune, labels)


def quantization(family: Family, runtime: str) -> QuantizationAwareTraining:
    """How qatkit quantizes a family for a runtime."""
    target = family.target if runtime == "ONNX Runtime" else family.openvino
    weight = QuantSpec(8 if target is None else 7, strategy=family.strategy, observer="lsq")
    options: dict[str, Any] = {"weight": weight, "target": target}
    if family.embeddings is not None:
        options |= {"include": ["*", family.embeddings], "layers": {family.embeddings: Scheme(QuantSpec(8))}}
    return QuantizationAwareTraining(exclude=family.exclude, **options)


def write(name: str, folder: Path, quick: bool) -> Written:
    """Train a family and write its files: PTQ's, and qatkit's for each runtime."""
    family = FAMILIES[name]
    network = minilm(family, quick) if family.build is None else classifier(family, quick)
    free = {kind: folder / f"{kind}.onnx" for kind in FILES[:3]}
    export_onnx(network.dense, network.example, free["fp32"])
    for kind in ("static", "dynamic"):
        quantize_free(f"quantize_{kind}", free["fp32"], network.calibration, free[kind])
    paths, trained = {}, {}
    for runtime, (export, file) in EXPORTS.items():
        trained[runtime] = network.tune(quantization(family, runtime))
        paths[runtime] = {**free, "qatkit": folder / file}
        export(trained[runtime], network.example, folder / file)
    return Written(network, paths, trained)
