"""Quantization-aware training with a teacher in your own Trainer.

Run: python examples/own_trainer.py
Needs: pip install 'qatkit[demo]'
"""

import copy
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks import KnowledgeDistillation, QuantizationAwareTraining
from torch import nn
from torch.nn import functional as F

from qatkit import QuantSpec
from qatkit.data import digits
from qatkit.export.onnx.format import export_onnx
from qatkit.export.verification import verify


class Classifier(LightningModule):
    """An ordinary LightningModule without any qatkit code."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(epochs: int = 10) -> None:
    data, module = digits(), Classifier()
    Trainer(max_epochs=epochs, enable_checkpointing=False, logger=False).fit(module, data)

    # three lines: int4 weights, int8 activations, and the model that was just trained as the teacher
    quantize = QuantizationAwareTraining(QuantSpec(4, observer="lsq"), QuantSpec(8, symmetric=False, strategy="tensor"))
    distill = KnowledgeDistillation(copy.deepcopy(module.net), temperature=4.0, alpha=0.7, student="net")
    Trainer(max_epochs=epochs, callbacks=[quantize, distill], enable_checkpointing=False, logger=False).fit(
        module, data
    )

    module.eval()
    images = next(iter(data.test_dataloader()))[0]
    export_onnx(module.net, images, Path("digits.onnx"))
    print(verify(module.net, Path("digits.onnx"), data.test_dataloader()).summary())


if __name__ == "__main__":
    main()
