"""Prune half of a network, stop and resume: sparsity with Lightning's ModelPruning and with qatkit.

Run: python examples/resume_pruning.py
Needs: pip install 'qatkit[demo]'
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from qatkit.callbacks.pruning import MagnitudePruning
from torch import nn
from torch.nn import functional as F

from qatkit.data import digits


class Classifier(LightningModule):
    """An ordinary LightningModule without any pruning code."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def lightning_pruning(module: Classifier) -> Callback:
    """Lightning's own callback, set to prune both layers once, as qatkit's does."""
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.net[1], "weight"), (module.net[3], "weight")],
        amount=0.5,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
    )


def qatkit_pruning(module: Classifier) -> Callback:
    """qatkit's callback."""
    return MagnitudePruning(0.5, scope="model")


def sparsity(module: Classifier) -> float:
    """Fraction of zeros in the weights of both layers."""
    weights = torch.cat([layer.weight.detach().flatten() for layer in module.net if isinstance(layer, nn.Linear)])
    return (weights == 0).float().mean().item()


def stop_and_resume(make: Callable[[Classifier], Callback], folder: Path) -> tuple[float, float]:
    """Sparsity after two epochs, and after two more epochs resumed from the checkpoint."""
    found = []
    for epochs, checkpoint in ((2, None), (4, folder / "stopped.ckpt")):
        seed_everything(1, verbose=False)
        module = Classifier()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[make(module)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, digits().train_dataloader(), ckpt_path=checkpoint)
        trainer.save_checkpoint(folder / "stopped.ckpt")
        found.append(sparsity(module))
    return found[0], found[1]


def main() -> None:
    for name, make in (("Lightning's ModelPruning", lightning_pruning), ("qatkit's MagnitudePruning", qatkit_pruning)):
        with tempfile.TemporaryDirectory() as folder:
            before, after = stop_and_resume(make, Path(folder))
        print(f"{name}: {before:.3f} of the weights are zeros before the stop, {after:.3f} after the resumed run")


if __name__ == "__main__":
    main()
