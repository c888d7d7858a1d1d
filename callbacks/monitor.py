"""What compression does to a model while it trains, as a handful of numbers."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from qatkit.quantization.measure import layer_table


class CompressionMonitor(Callback):
    """Logs summaries over all quantized layers at the end of every training epoch.

    ``quant/weight_error`` is the root of the squared rounding error over the squared weights; ``quant/clip_rate`` the
    share of weights outside their range; ``quant/sparsity`` the share of weights whose code stands for zero.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import CompressionMonitor
        >>> trainer = Trainer(callbacks=[CompressionMonitor()])
    """

    @override
    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = layer_table(pl_module)
        if not rows:
            return
        total = sum(row.weights for row in rows)
        for key in ("weight_error", "clip_rate", "sparsity"):
            mean = sum(getattr(row, key) * row.weights for row in rows) / total
            pl_module.log(f"quant/{key}", mean, rank_zero_only=True)
