"""Movement pruning: rank weights by how fine-tuning changes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks.pruning import MagnitudePruning
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_floor, nonzeros
from qatkit.pruning.schedule import Ramp
from qatkit.pruning.scores import add_movement
from qatkit.pruning.selection import lowest
from qatkit.pruning.shards import local, rows_here, total_counts


class MovementPruning(MagnitudePruning):
    """Prune the weights that fine-tuning moves towards 0, regardless of magnitude, along a sparsity ramp.

    The score of a weight is the sum over steps of ``-w * g`` (Sanh, Wolf and Rush 2020,
    https://arxiv.org/abs/2005.07683). Unlike in the paper, a pruned weight stays pruned, as with the other pruning
    callbacks. Scores take 4 bytes per weight, and are saved in checkpoints.

    Args:
        ramp: Sparsity as a function of training progress. It must start at sparsity 0 and after the first step, because
            no scores exist before then.
        scope: "layer" prunes every layer to the same sparsity; "model" ranks the weights of all layers together.
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.

    Raises:
        QatkitError: for the same reasons as in `MagnitudePruning`, or if the ramp prunes before scores exist.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks.movement import MovementPruning
        >>> from qatkit.pruning.schedule import Ramp
        >>> trainer = Trainer(callbacks=[MovementPruning(Ramp(0.9, start=0.1, end=0.7), exclude=["*.head"])])
    """

    def __init__(
        self,
        ramp: Ramp,
        scope: Literal["layer", "model"] = "layer",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(ramp=ramp, scope=scope, include=include, exclude=exclude)
        if ramp.initial or not ramp.start:
            raise QatkitError(
                f"start={ramp.start} and initial={ramp.initial} would prune before the first step, when no movement "
                "scores exist",
                key="ramp",
                advice="use initial=0 and a positive start, such as 0.1",
            )
        self._scores: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._scores = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loaded, self._scores = self._scores, {}
        for name, layer in self.select(pl_module).items():
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            self._scores[name] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            if name in loaded:
                local(self._scores[name]).copy_(rows_here(loaded[name], weight))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._step is None:
            for name, scores in self._scores.items():
                weight = pl_module.get_submodule(name).weight
                assert isinstance(weight, nn.Parameter)
                if weight.grad is not None:
                    # after a float16 overflow the scaler skips the step, but a NaN would stay in the sum forever
                    gradient = local(weight.grad).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                    add_movement(local(scores), local(weight), gradient)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        whole = {
            name: scores.full_tensor() if hasattr(scores, "full_tensor") else scores
            for name, scores in self._scores.items()
        }
        return super().state_dict() | {"scores": whole}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._scores = dict(state_dict["scores"])

    @override
    def _masks_at(self, weights: dict[str, nn.Parameter], level: int) -> dict[str, Tensor]:
        scores = {name: self._scores[name].clone() for name in weights}
        for name, weight in weights.items():
            local(scores[name]).masked_fill_(~nonzeros(weight), torch.finfo(torch.float32).min)
        sparsity = self._sparsity_at(level)
        if self.scope == "model":
            masks = lowest(scores, round(sparsity * sum(weight.numel() for weight in weights.values())), signed=True)
        else:
            masks = {}
            for name, values in scores.items():
                count = round(sparsity * values.numel())
                check_floor(name, values.numel() - count, values.numel())
                masks |= lowest({name: values}, count, signed=True)
        kept = total_counts({name: int(mask.sum()) for name, mask in masks.items()}, weights)
        for name, weight in weights.items():
            check_floor(name, kept[name], weight.numel())
        return masks
