"""Find the outputs that a runtime's integer kernels write in the forward pass of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.batches import first_batches
from torch import Tensor
from torch.utils._pytree import tree_map

from qatkit.errors import QatkitError
from qatkit.quantization.folding import Fold
from qatkit.quantization.placement.points import Placement
from qatkit.quantization.placement.preparation import call, fold_and_find
from qatkit.quantization.targets import Target
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec


def module_placement(
    trainer: Trainer,
    pl_module: LightningModule,
    forward: Callable[[LightningModule, Any], object],
    schemes: Mapping[str, Scheme],
    activation: QuantSpec,
    target: Target,
) -> tuple[list[Fold], Placement]:
    """Fold BatchNorm, and return the folded pairs and the outputs to quantize, found by a forward pass in eval mode.

    The input is the module's ``example_input_array`` if it has one, and otherwise the first training batch.

    Args:
        trainer: The Trainer, before its strategy moves the module.
        pl_module: The module, with plain layers, on the CPU or the meta device.
        forward: Runs the module on a batch.
        schemes: The planned quantization by layer name.
        activation: Quantization of the outputs.
        target: The runtime.

    Raises:
        QatkitError: the module has no example input and the Trainer has no training data. The module is left unchanged.
    """
    example = pl_module.example_input_array
    batch = example if example is not None else _first_batch(trainer)
    first = next(pl_module.parameters())
    batch = tree_map(lambda x: x.to(first.device) if isinstance(x, Tensor) else x, batch)

    def run() -> object:
        with trainer.precision_plugin.forward_context():
            converted = trainer.precision_plugin.convert_input(batch)
            return call(pl_module, converted) if example is not None else forward(pl_module, converted)

    return fold_and_find(pl_module, run, schemes, activation, target)


def _first_batch(trainer: Trainer) -> Any:
    source = trainer.fit_loop._data_source  # Lightning sets up the loader itself only after the optimizers
    with isolate_rng():
        loader = source.dataloader() if source.is_defined() else None
        for batch in [] if loader is None else first_batches(loader, 1):
            return batch
    raise QatkitError(
        "placing activation quantizers requires a forward pass, but the Trainer has no training batch yet",
        key="target",
        advice="set example_input_array in the LightningModule, or call fit before validate, test and predict",
    )
