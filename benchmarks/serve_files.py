"""Parts of `serve.py`: train a network on scikit-learn's digits, and write its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from serve_models import FAMILIES, Bert, Family
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qatkit import QuantSpec, Scheme
from qatkit.data import digits
from qatkit.export.onnx import export_onnx
from qatkit.export.onnx_baselines import quantize as quantize_free

FILES = ("fp32", "static", "dynamic", "qatkit")


class Classifier(LightningModule):
    """A classifier that is trained with Adam."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def samples(family: Family) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and labels for training and for tests."""
    data = digits(size=8 if family.tokens else 32, val_fraction=0.1, test_fraction=0.3)
    parts = [part.tensors for part in (data.train, data.test)]  # type: ignore[union-attr]  # tensor data sets
    if not family.tokens:
        return parts[0], parts[1]
    levels = Bert.LEVELS - 1
    first, second = [((images.flatten(1) * levels).round().long(), labels) for images, labels in parts]
    return first, second


def train(model: nn.Module, family: Family, steps: int, lr: float, callbacks: list[Any]) -> None:
    """Train a model on the digits."""
    seed_everything(0)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Classifier(model, lr), DataLoader(TensorDataset(*samples(family)[0]), 64, shuffle=True))
    model.eval()


def write(name: str, folder: Path, quick: bool) -> nn.Module:
    """Train a family, write its four files, and return the trained model."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model, inputs = family.build(), samples(family)[0][0]
    train(model, family, 40 if quick else family.dense_steps, family.lr, [])
    dense = copy.deepcopy(model)
    paths = {kind: folder / f"{kind}.onnx" for kind in FILES}
    example = {"input_ids": inputs[:2]} if family.tokens else inputs[:2]
    export_onnx(dense, example, paths["fp32"])
    for kind in ("static", "dynamic"):
        quantize_free(f"quantize_{kind}", paths["fp32"], inputs[:256].split(64), paths[kind])
    weight = QuantSpec(8 if family.target is None else 7, observer="lsq")
    options: dict[str, Any] = {"weight": weight, "exclude": family.exclude}
    if family.target is not None:
        options["target"] = family.target
    if family.tokens:
        options |= {"include": ["*", "*_embeddings"], "layers": {"*_embeddings": Scheme(QuantSpec(8))}}
    distill = KnowledgeDistillation(dense, temperature=2.0, alpha=0.9, student="model")
    steps = 10 if quick else family.steps
    train(model, family, steps, 1e-3 if family.integer else 3e-4, [QuantizationAwareTraining(**options), distill])
    export_onnx(model, example, paths["qatkit"])
    return model
