"""Weight rewinding: restore earlier weights under the current pruning mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks.pruning_callback import PruningCallback
from torch import Tensor
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.masks import apply_mask, nonzeros
from qatkit.pruning.shards import local, rows_here, total_counts


class WeightRewinding(Callback):
    """Start training from earlier weights, under the mask of the preceding pruning callbacks.

    This is the step between two rounds of iterative magnitude pruning. Frankle and Carbin (2019,
    https://arxiv.org/abs/1803.03635) rewind to the initial weights; Frankle et al. (2020,
    https://arxiv.org/abs/1912.05671) rewind to the weights of an early step. All parameters and buffers are restored,
    including biases and BatchNorm statistics; only pruned weights stay zero. The optimizer starts with an empty state.
    A training run that resumes from a checkpoint does not rewind again.

    Args:
        earlier: The unsharded state dict of the LightningModule at an earlier step, on any device.

    Raises:
        QatkitError: no pruning callback precedes it; the weights do not match the module; or an unpruned weight would
            become 0 and thus be indistinguishable from a pruned one.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import MagnitudePruning, WeightRewinding
        >>> early = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
        >>> trainer = Trainer(callbacks=[MagnitudePruning(0.5), WeightRewinding(early)])
    """

    def __init__(self, earlier: Mapping[str, Tensor]) -> None:
        self._earlier = {name: tensor.detach().clone() for name, tensor in earlier.items()}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self._pruning(trainer):
            raise QatkitError(
                "WeightRewinding requires a pruning callback before it, and keeps the mask of that callback",
                key="callbacks",
                advice="use callbacks=[MagnitudePruning(0.5), WeightRewinding(...)]",
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return  # the checkpoint is from after the rewind
        current = pl_module.state_dict()
        _check_fits(self._earlier, current)
        pruned = {name: weight for each in self._pruning(trainer) for name, weight in each.weights(pl_module).items()}
        masks = {name: nonzeros(weight) for name, weight in pruned.items()}
        lost = {
            name: int((mask & (rows_here(self._earlier[f"{name}.weight"], pruned[name]).to(mask.device) == 0)).sum())
            for name, mask in masks.items()
        }
        for name, count in total_counts(lost, pruned).items():
            if count:  # checked before the first change, so an error leaves the module unchanged
                raise QatkitError(
                    f"{count} kept weights of layer '{name}' are 0 in the earlier weights, so they would be treated as "
                    "pruned",
                    advice="use weights of a later step, or exclude the layer",
                )
        with torch.no_grad():
            for name, tensor in current.items():
                local(tensor).copy_(rows_here(self._earlier[name], tensor))
        for name, weight in pruned.items():
            apply_mask(weight, masks[name])

    def _pruning(self, trainer: Trainer) -> list[PruningCallback]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        return [each for each in callbacks[: callbacks.index(self)] if isinstance(each, PruningCallback)]


def _check_fits(earlier: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    different = [
        name
        for name in [*current, *earlier]
        if name not in earlier or name not in current or earlier[name].shape != current[name].shape
    ]
    if different:
        raise QatkitError(
            f"{len(set(different))} tensors differ in shape or exist on only one side, such as '{different[0]}'",
            key="earlier",
            advice="pass an earlier state_dict() of the same module",
        )
