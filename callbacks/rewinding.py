"""Going back to earlier weights under the zeros that pruning made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from qatkit.callbacks.held_zeros import HeldZeros
from torch import Tensor
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.masks import apply_mask, nonzeros
from qatkit.pruning.shards import local, rows_here, total_counts


class WeightRewinding(Callback):
    """Starts training with the weights of an earlier time, under the zeros that the callbacks before it have made.

    The step between two rounds of iterative magnitude pruning: Frankle and Carbin (2019,
    https://arxiv.org/abs/1803.03635) go back to the initial weights, Frankle et al. (2020,
    https://arxiv.org/abs/1912.05671) to those of an early step. Everything goes back, biases and the statistics of
    BatchNorm too; only the zeros stay. The optimizer starts anew, and a resumed run goes on as it was.

    Args:
        earlier: The state dict of the LightningModule at that time, whole, on any device.

    Raises:
        QatkitError: no pruning callback stands before it, the weights do not fit the module, or a weight that was not
            pruned would become 0, which could no longer be told from a pruned one.

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
                "callbacks: WeightRewinding has no pruning callback before it, whose zeros would stay; write "
                "callbacks=[MagnitudePruning(0.5), WeightRewinding(...)]"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return  # the checkpoint is from after the rewind
        current = pl_module.state_dict()
        _check_fits(self._earlier, current)
        held = {name: weight for each in self._pruning(trainer) for name, weight in each.weights(pl_module).items()}
        masks = {name: nonzeros(weight) for name, weight in held.items()}
        lost = {
            name: int((mask & (rows_here(self._earlier[f"{name}.weight"], held[name]).to(mask.device) == 0)).sum())
            for name, mask in masks.items()
        }
        for name, count in total_counts(lost, held).items():
            if count:  # before the first change: after an error the module is still the user's
                raise QatkitError(
                    f"layer '{name}': {count} weights that were kept are 0 at the time to go back to, and would count "
                    "as pruned; go back to a later step, or exclude the layer"
                )
        with torch.no_grad():
            for name, tensor in current.items():
                local(tensor).copy_(rows_here(self._earlier[name], tensor))
        for name, weight in held.items():
            apply_mask(weight, masks[name])

    def _pruning(self, trainer: Trainer) -> list[HeldZeros]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        return [each for each in callbacks[: callbacks.index(self)] if isinstance(each, HeldZeros)]


def _check_fits(earlier: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    unlike = [
        name
        for name in [*current, *earlier]
        if name not in earlier or name not in current or earlier[name].shape != current[name].shape
    ]
    if unlike:
        raise QatkitError(
            f"WeightRewinding: '{unlike[0]}' and {len(set(unlike)) - 1} more are not in both the module and the "
            "weights to go back to, or have another shape; give the state_dict() of the module at an earlier time"
        )
