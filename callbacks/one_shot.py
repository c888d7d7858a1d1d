"""One-shot pruning with calibration batches, before training recovers the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.batches import as_training_does, first_batches, module_forward, on_every_process
from qatkit.callbacks.pruning_callback import PruningCallback
from torch import Tensor, nn
from torch import distributed as dist
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.gradient import prune_by_gradient
from qatkit.pruning.masks import check_nm, check_nm_pair, check_sparsity
from qatkit.pruning.methods import METHODS
from qatkit.pruning.one_shot import check_linear, prune_one_shot


class OneShotPruning(PruningCallback):
    """Prune before training, calibrated on the first training batches, and keep the mask during training.

    Under DDP, every process uses the weights that rank 0 pruned. For sharded weights, use `MagnitudePruning`.

    Args:
        method: "wanda" and "sparsegpt" prune linear layers (see `qatkit.pruning.one_shot.prune_one_shot`); "taylor"
            prunes by ``(w * g) ** 2`` summed over batches (see `qatkit.pruning.gradient.prune_by_gradient`).
        sparsity: Fraction of pruned weights, between 0 and 1 (exclusive). Set exactly one of `sparsity` and `nm`.
        nm: ``(N, M)`` keeps N of every M consecutive inputs.
        scope: With "taylor" and `sparsity`, "model" ranks the weights of all layers together.
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.
        calibration_batches: Number of training batches for calibration.
        calibration_forward: Runs the LightningModule on one batch. The default is ``module(*inputs)``, as in
            `QuantizationAwareTraining`. Required for "taylor", where it must return the loss of the batch.

    Raises:
        QatkitError: the method is unknown; settings conflict; a pattern matches nothing; the method or `nm` cannot be
            applied to a layer; a layer would lose all its weights; or a resumed layer has a different number of zeros
            than when it was saved.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import OneShotPruning
        >>> trainer = Trainer(callbacks=[OneShotPruning("sparsegpt", nm=(2, 4), exclude=["*.head"])])
    """

    def __init__(
        self,
        method: str,
        sparsity: float | None = None,
        nm: tuple[int, int] | None = None,
        scope: Literal["layer", "model"] = "layer",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        calibration_batches: int = 16,
        calibration_forward: Callable[[LightningModule, Any], object] | None = None,
    ) -> None:
        super().__init__(include, exclude)
        row = METHODS.row(method, "method")
        if not row.measures:
            raise QatkitError(
                f"'{method}' is not a one-shot method",
                key="method",
                advice=f"use one of {', '.join(each.name for each in METHODS.values() if each.measures)}",
            )
        if (sparsity is None) == (nm is None):
            raise QatkitError(
                "exactly one of sparsity and nm is required", key="sparsity", advice="pass sparsity=0.5 or nm=(2, 4)"
            )
        if sparsity is not None:
            check_sparsity("sparsity", sparsity)
            if not sparsity:
                raise QatkitError("0 prunes nothing", key="sparsity", advice="use a positive fraction, such as 0.5")
        if nm is not None:
            check_nm_pair(nm)
        if scope != "layer" and ("scope" not in row.keys or nm is not None):
            others = [each.name for each in METHODS.values() if each.measures and "scope" in each.keys]
            raise QatkitError(
                f"'{scope}' has no effect without sparsity and method {' or '.join(others)}",
                key="scope",
                advice="remove scope",
            )
        if row.measures == "gradients" and calibration_forward is None:
            raise QatkitError(
                f"method '{method}' needs the loss of a batch",
                key="calibration_forward",
                advice="pass calibration_forward=lambda module, batch: cross_entropy(module(batch[0]), batch[1])",
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
        if METHODS[self.method].linear_only:
            check_linear(self.method, layers)
        for name, layer in layers.items():
            if self.nm is not None:
                check_nm(name, layer.weight, *self.nm)  # type: ignore[arg-type]  # a Parameter
        return layers

    @override
    def start(self, pl_module: LightningModule) -> None:
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            raise QatkitError(
                f"'{self.method}' requires unsharded weights, but FSDP2 shards them",
                key="method",
                advice="use MagnitudePruning, one process or strategy='ddp'",
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
            # every process calibrated on its own batches; all take the result of the first
            for layer in layers.values():
                dist.broadcast(layer.weight.data, 0)  # type: ignore[arg-type]  # a Parameter
        self.layers = list(layers)

    def _prune(self, module: LightningModule, batches: Iterator[Any], forward: Callable[[Any], object]) -> None:
        names = list(self.select(module))
        if METHODS[self.method].measures != "gradients":
            prune_one_shot(module, batches, self.method, self.sparsity, self.nm, names, (), forward)
            return

        def loss(batch: Any) -> Tensor:
            value = forward(batch)
            assert isinstance(value, Tensor)
            return value

        prune_by_gradient(module, batches, loss, self.sparsity, self.nm, self.scope, names, method=self.method)
