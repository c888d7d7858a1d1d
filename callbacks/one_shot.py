"""Pruning at once by what a few batches say, before training makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.batches import as_training_does, first_batches, module_forward, on_every_process
from qatkit.callbacks.held_zeros import HeldZeros
from torch import Tensor, nn
from torch import distributed as dist
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.gradient import prune_by_gradient
from qatkit.pruning.masks import check_nm, check_nm_pair, check_sparsity
from qatkit.pruning.one_shot import check_linear, prune_one_shot


class OneShotPruning(HeldZeros):
    """Prunes before training by what the first training batches say, and keeps the zeros from then on.

    Under DDP the zeros are those that the first process finds. For sharded weights there is `MagnitudePruning`.

    Args:
        method: "wanda" and "sparsegpt" prune linear layers, see `qatkit.pruning.one_shot.prune_one_shot`; "taylor"
            prunes by ``(w * g) ** 2`` summed over batches, see
            `qatkit.pruning.gradient.prune_by_gradient`.
        sparsity: Share of zeros, above 0 and below 1; give it or `nm`.
        nm: ``(N, M)`` keeps N of every M neighbouring inputs.
        scope: With "taylor", "model" prunes the lowest scores of all layers together.
        include: Globs over layer names of the LightningModule; every one must match a layer.
        exclude: Globs over layer names that are left alone.
        calibration_batches: How many training batches are looked at.
        calibration_forward: Runs the LightningModule on one batch; ``module(*inputs)`` by default, as in
            `QuantizationAwareTraining`. With "taylor" it is needed, and returns the loss of the batch.

    Raises:
        QatkitError: settings that do not go together, a pattern that matches nothing, a layer that the method or `nm`
            does not fit, that would lose all its weights, or that resumes with other zeros than it was saved with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import OneShotPruning
        >>> trainer = Trainer(callbacks=[OneShotPruning("sparsegpt", nm=(2, 4), exclude=["*.head"])])
    """

    def __init__(
        self,
        method: Literal["wanda", "sparsegpt", "taylor"],
        sparsity: float | None = None,
        nm: tuple[int, int] | None = None,
        scope: Literal["layer", "model"] = "layer",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        calibration_batches: int = 16,
        calibration_forward: Callable[[LightningModule, Any], object] | None = None,
    ) -> None:
        super().__init__(include, exclude)
        if method not in ("wanda", "sparsegpt", "taylor"):
            raise QatkitError(f"method: '{method}' is unknown; write 'wanda', 'sparsegpt' or 'taylor'")
        if (sparsity is None) == (nm is None):
            raise QatkitError("OneShotPruning: write one of sparsity=0.5 and nm=(2, 4)")
        if sparsity is not None:
            check_sparsity("sparsity", sparsity)
            if not sparsity:
                raise QatkitError("sparsity: 0 prunes nothing; write a share of zeros above 0, such as 0.5")
        if nm is not None:
            check_nm_pair(nm)
        if scope != "layer" and (method != "taylor" or nm is not None):
            raise QatkitError(f"scope: '{scope}' goes with method='taylor' and sparsity alone; leave it out")
        if method == "taylor" and calibration_forward is None:
            raise QatkitError(
                "calibration_forward: method='taylor' needs the loss of a batch; write calibration_forward=lambda "
                "module, batch: cross_entropy(module(batch[0]), batch[1])"
            )
        self.method = method
        self.sparsity = sparsity
        self.nm = nm
        self.scope = scope
        self.calibration_batches = calibration_batches
        self.calibration_forward = calibration_forward or module_forward

    @override
    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        layers = super().select(pl_module)
        if self.method != "taylor":
            check_linear(self.method, layers)
        for name, layer in layers.items():
            if self.nm is not None:
                check_nm(name, layer.weight, *self.nm)  # type: ignore[arg-type]  # a Parameter
        return layers

    @override
    def start(self, pl_module: LightningModule) -> None:
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            raise QatkitError(
                f"method: '{self.method}' needs whole weights, and FSDP2 has sharded them; prune with magnitudes, or "
                "on one process or with strategy='ddp'"
            )
        layers = self.select(pl_module)
        self.check_not_empty(layers)
        trainer: Trainer = pl_module.trainer
        trainer.fit_loop.setup_data()  # before random numbers are isolated: it draws the seed of the training order
        batches = first_batches(trainer.train_dataloader, self.calibration_batches)
        forward = as_training_does(trainer, pl_module, self.calibration_forward)
        with isolate_rng():
            on_every_process(lambda: self._prune(pl_module, batches, forward))
        if dist.is_available() and dist.is_initialized():
            # every process has seen batches of its own: what the first one found holds
            for layer in layers.values():
                dist.broadcast(layer.weight.data, 0)  # type: ignore[arg-type]  # a Parameter
        self.layers = list(layers)

    def _prune(self, module: LightningModule, batches: Iterator[Any], forward: Callable[[Any], object]) -> None:
        names = list(self.select(module))
        if self.method != "taylor":
            prune_one_shot(module, batches, self.method, self.sparsity, self.nm, names, (), forward)
            return

        def loss(batch: Any) -> Tensor:
            found = forward(batch)
            assert isinstance(found, Tensor)
            return found

        prune_by_gradient(module, batches, loss, self.sparsity, self.nm, self.scope, names)
