"""The pruning methods of a recipe's ``prune`` block, and the importance measures of its ``shrink`` block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatkit.common.tables import Table

TARGETS = ("sparsity", "ramp", "nm")
"""Keys of the ``prune`` block that set the amount of pruning; a block has exactly one of them."""


@dataclass(frozen=True)
class PruningMethod:
    """A method that selects the weights to prune.

    A method has either a `function`, which `qatkit.callbacks.OneShotPruning` applies once before training, or its own
    `callback`.
    """

    name: str
    description: str
    keys: tuple[str, ...]
    """Keys of the ``prune`` block that the method accepts, in addition to `include` and `exclude`. They are also the
    arguments of its callback.
    """
    function: str = ""
    """``module:function`` that scores or prunes one weight; `measures` determines its arguments."""
    measures: Literal["", "input_norms", "gram", "gradients"] = ""
    """Statistics of calibration batches that `function` accepts in addition to the weight ``[out, in]``.

    input_norms: L2 norm of every input, ``[in]``. The function returns scores, which are compared within each output.
    gram: ``X.T @ X`` of the inputs, ``[in, in]``, followed by `sparsity` and `nm`. The function returns the pruned
        weight.
    gradients: gradient of the loss on one batch. The function returns scores, which are summed over batches.
    """
    callback: str = ""
    """``module:class`` of a `qatkit.callbacks.pruning_callback.PruningCallback`."""
    linear_only: bool = False
    """Whether the method supports only linear layers."""
    sharded: bool = False
    """Whether the method supports weights sharded by FSDP2."""
    moves_mask: bool = False
    """Whether the mask changes until the stage ends, even without a ramp."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The keys of `TARGETS` that the method supports."""
        return tuple(key for key in self.keys if key in TARGETS)


METHODS = Table(
    "pruning method",
    [
        PruningMethod(
            "magnitude",
            "smallest absolute values",
            ("sparsity", "ramp", "nm", "scope", "block", "layers"),
            callback="qatkit.callbacks.pruning:MagnitudePruning",
            sharded=True,
        ),
        PruningMethod(
            "wanda",
            "smallest product of magnitude and input norm within each output; linear layers only",
            ("sparsity", "nm", "calibration_batches"),
            function="qatkit.pruning.scores:wanda_scores",
            measures="input_norms",
            linear_only=True,
        ),
        PruningMethod(
            "sparsegpt",
            "smallest error of the layer's output, with the kept weights updated to compensate; linear layers only",
            ("sparsity", "nm", "calibration_batches"),
            function="qatkit.pruning.sparsegpt:sparsegpt",
            measures="gram",
            linear_only=True,
        ),
        PruningMethod(
            "taylor",
            "smallest first-order change of the loss, `(w * g) ** 2` summed over batches",
            ("sparsity", "nm", "scope", "calibration_batches"),
            function="qatkit.pruning.scores:taylor_scores",
            measures="gradients",
        ),
        PruningMethod(
            "movement",
            "weights that training moves towards zero; needs a ramp with a `start`",
            ("ramp", "scope"),
            callback="qatkit.callbacks.movement:MovementPruning",
            sharded=True,
        ),
        PruningMethod(
            "srste",
            "smallest absolute values, with an N:M mask that changes during training (dense gradients)",
            ("nm",),
            callback="qatkit.callbacks.srste:SparseRefinedSTE",
            sharded=True,
            moves_mask=True,
        ),
    ],
)


@dataclass(frozen=True)
class ImportanceMeasure:
    """A measure of importance for the parts of a model that ``shrink`` may remove.

    `transformer` and `channels` refer to functions as ``module:function``. They are called with the model and, if
    `measures` is set, with calibration batches and a function that returns the outputs or the loss for one batch.
    """

    name: str
    description: str
    transformer: str
    """Function that scores layers, heads, neurons and hidden channels; see `qatkit.pruning.structure.Importance`."""
    channels: str = ""
    """Function that scores output channels by layer name; empty to use the group norms of Torch-Pruning."""
    measures: Literal["", "outputs", "loss"] = ""


IMPORTANCES = Table(
    "importance measure",
    [
        ImportanceMeasure(
            "activation",
            "magnitude of the activations on the calibration batches",
            transformer="qatkit.pruning.structure:importance",
            channels="qatkit.pruning.channel_importance:channel_scores",
            measures="outputs",
        ),
        ImportanceMeasure(
            "magnitude",
            "norm of the weights",
            transformer="qatkit.pruning.weight_importance:magnitude_importance",
        ),
        ImportanceMeasure(
            "taylor",
            "first-order estimate of the change in loss when the part is removed, on the calibration batches",
            transformer="qatkit.pruning.weight_importance:taylor_importance",
            channels="qatkit.pruning.channel_importance:taylor_channel_scores",
            measures="loss",
        ),
    ],
)
