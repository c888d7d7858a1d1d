"""SR-STE: N:M sparse training with a mask that changes during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks.pruning_callback import AVERAGING, PruningCallback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.masks import apply_mask, check_nm, check_nm_pair, nm_mask
from qatkit.pruning.shards import local, rows_here


class SparseRefinedSTE(PruningCallback):
    """Train dense weights, and use only their N:M sparse part in the forward pass (SR-STE).

    The update is ``w <- w - lr * (g(mask * w) + decay * (1 - mask) * w)``, with the mask recomputed from ``w`` in every
    step (Zhou et al. 2021, https://arxiv.org/abs/2102.04010). This is the only pruning callback with dense gradients:
    pruned weights keep training, and are used again if they become larger than their neighbors. Between steps, the
    module holds the sparse weights, so validation and checkpoints use N:M sparse weights. The callback stores the
    pruned values, which takes as much memory as the layers' weights, and saves them in checkpoints.

    Args:
        nm: ``(N, M)`` keeps N of every M consecutive inputs.
        decay: Weight decay of pruned weights, which makes the mask more stable; 0 is a plain straight-through
            estimator.
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.

    Raises:
        QatkitError: a pattern matches nothing, or `nm` cannot be applied to a layer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks.srste import SparseRefinedSTE
        >>> trainer = Trainer(callbacks=[SparseRefinedSTE((2, 4), exclude=["*.head"])])
    """

    def __init__(
        self,
        nm: tuple[int, int] = (2, 4),
        decay: float = 2e-4,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(include, exclude)
        if not decay >= 0:
            raise QatkitError(
                f"{decay} is out of range", key="decay", advice="use 0 or a small positive number, such as 2e-4"
            )
        check_nm_pair(nm)
        self.nm = nm
        self.decay = decay
        self._pruned: dict[str, Tensor] = {}
        self._stepped = False
        self._after: RemovableHandle | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._pruned, self._stepped = {}, False
        averaging = [c for c in trainer.callbacks if isinstance(c, AVERAGING)]  # type: ignore[attr-defined]  # set by Lightning
        if averaging:
            raise QatkitError(
                f"{type(averaging[0]).__name__} averages weights with different masks, which leaves no zeros",
                key="callbacks",
                advice=f"remove {type(averaging[0]).__name__}, or average in a later call to fit with ConstantPruning",
            )

    @override
    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        layers = super().select(pl_module)
        for name, layer in layers.items():
            check_nm(name, layer.weight, *self.nm)  # type: ignore[arg-type]  # a Parameter
        return layers

    @override
    def start(self, pl_module: LightningModule) -> None:
        layers = self.select(pl_module)
        self.check_not_empty(layers)
        self.layers = list(layers)
        self._split(pl_module)

    @override
    def resume(self, pl_module: LightningModule, recorded: dict[str, int]) -> None:
        super().resume(pl_module, recorded)
        loaded, self._pruned = self._pruned, {}
        for name, weight in self.weights(pl_module).items():
            self._pruned[name] = torch.zeros_like(weight, requires_grad=False)
            if name in loaded:
                local(self._pruned[name]).copy_(rows_here(loaded[name], weight))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._stepped:
            return
        self._stepped = True
        with torch.no_grad():
            for name, weight in self.weights(pl_module).items():
                pruned = local(self._pruned[name])
                local(weight.detach()).add_(pruned)
                if weight.grad is not None:
                    local(weight.grad).add_(pruned, alpha=self.decay)
        # not at the end of the batch: with manual optimization, a batch may have several steps
        self._remove_hook()
        self._after = optimizer.register_step_post_hook(lambda *_: self._split(pl_module) if self._stepped else None)

    @override
    def reapply(self, pl_module: LightningModule) -> None:
        if self._stepped:
            self._split(pl_module)
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._after is not None:
            self._after.remove()  # not inside the optimizer's step, which iterates over its hooks
        self._after = None

    def _split(self, pl_module: LightningModule) -> None:
        """Split every weight into its N:M sparse part, which stays in the module, and the pruned values."""
        for name, weight in self.weights(pl_module).items():
            mask = nm_mask(weight, *self.nm, name)
            self._pruned[name] = weight.detach().clone()
            apply_mask(self._pruned[name], ~mask)
            apply_mask(weight, mask)
        self._stepped = False

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        whole = {
            name: pruned.full_tensor() if hasattr(pruned, "full_tensor") else pruned
            for name, pruned in self._pruned.items()
        }
        return state | {"pruned": whole}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._pruned = dict(state_dict["pruned"])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_after": None}
