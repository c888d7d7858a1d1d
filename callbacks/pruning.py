"""Pruning in anybody's LightningModule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks.held_zeros import AVERAGING, HeldZeros
from torch import Tensor, nn
from typing_extensions import override

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.pruning.layers import check_pattern, share_of
from qatkit.pruning.masks import (
    apply_mask,
    block_mask,
    check_block,
    check_floor,
    check_nm,
    check_nm_pair,
    check_pair,
    check_sparsity,
    count_zeros,
    global_masks,
    nm_mask,
)
from qatkit.pruning.schedule import Ramp
from qatkit.pruning.shards import total_counts

UPDATES = 100
"""Steps in which a ramp rises; what is pruned in one of them can still be made up for before the next."""


class MagnitudePruning(HeldZeros):
    """Sets the smallest weights to zero, at once or along a ramp, and keeps them there.

    Without a ramp the weights are pruned once, before training; training then makes up for it. Masks are exact: of
    ``n`` weights ``round(sparsity * n)`` are zeros, the same ones on any number of processes. Beside
    `QuantizationAwareTraining`, stand before it: its ranges are then those of the pruned model.

    Args:
        sparsity: Share of zeros, above 0 and below 1. Give one of `sparsity`, `ramp` and `nm`.
        scope: "layer" prunes every layer to this share, "model" the smallest weights of all layers together.
        nm: ``(N, M)`` keeps N of every M neighbouring inputs, such as ``(2, 4)``.
        block: Rows and columns of the blocks that are pruned as a whole.
        ramp: How sparsity grows with training progress.
        include: Globs over layer names of the LightningModule; every one must match a layer.
        exclude: Globs over layer names that are left alone.
        layers: Shares for the layers that a glob matches, instead of `sparsity`; the last match decides, 0 leaves them
            alone.

    Raises:
        QatkitError: settings that do not go together, a pattern that matches nothing, a layer that `nm` or `block` does
            not fit, that would lose all its weights, or that resumes with other zeros than it was saved with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks.pruning import MagnitudePruning
        >>> from qatkit.pruning.schedule import Ramp
        >>> trainer = Trainer(callbacks=[MagnitudePruning(ramp=Ramp(0.8, end=0.5), exclude=["*.head"])])
    """

    def __init__(
        self,
        sparsity: float | None = None,
        scope: Literal["layer", "model"] = "layer",
        nm: tuple[int, int] | None = None,
        block: tuple[int, int] | None = None,
        ramp: Ramp | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        layers: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(include, exclude)
        given = [key for key, value in (("sparsity", sparsity), ("ramp", ramp), ("nm", nm)) if value is not None]
        if len(given) != 1:
            raise QatkitError(
                f"MagnitudePruning: {' and '.join(given) or 'nothing'} {'are' if given else 'is'} given; write one of "
                "sparsity=0.5, ramp=Ramp(0.5) and nm=(2, 4)"
            )
        if sparsity is not None:
            check_sparsity("sparsity", sparsity)
        if ramp is not None and not isinstance(ramp, Ramp):
            raise QatkitError(f"ramp: {ramp!r} is no ramp; write Ramp(0.5)")
        self.ramp = ramp if ramp is not None else Ramp(sparsity or 0.0, end=0.0)
        if nm is not None:
            check_nm_pair(nm)
        if block is not None:
            check_pair("block", block, (16, 16))
        if nm is None and not self.ramp.final:
            raise QatkitError("sparsity: 0.0 prunes nothing; write a share of zeros above 0, such as 0.5")
        if scope not in ("layer", "model"):
            raise QatkitError(f"scope: '{scope}' is unknown; write 'layer' or 'model'")
        self.layer_sparsity = dict(layers or {})
        for key, value in (("scope='model'", scope == "model"), ("nm", nm)):
            if value and self.layer_sparsity:
                raise QatkitError(f"layers: {self.layer_sparsity} has no meaning with {key}; leave one of them out")
        if block is not None and (nm is not None or scope == "model"):
            raise QatkitError(f"block: {block} does not go together with nm or scope='model'; leave one of them out")
        if nm is not None and scope == "model":
            raise QatkitError("scope: 'model' has no meaning with nm, which keeps as many in every group; leave it out")
        for pattern, share in self.layer_sparsity.items():
            check_sparsity(f"layers['{pattern}']", share)
        self.scope = scope
        self.nm = nm
        self.block = block
        self._level = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._level = -1
        averaging = [c for c in trainer.callbacks if isinstance(c, AVERAGING)]  # type: ignore[attr-defined]  # set by Lightning
        if averaging and self.ramp.end > self.ramp.start:
            raise QatkitError(
                f"ramp: {type(averaging[0]).__name__} averages weights of before and after they are pruned, which "
                "leaves no zeros; prune in an earlier stage and hold the zeros with ConstantPruning"
            )

    @override
    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        layers = super().select(pl_module)
        for pattern in self.layer_sparsity:
            check_pattern(f"layers['{pattern}']", pattern, list(layers))
        layers = {name: layer for name, layer in layers.items() if self._ramp_of(name).final or self.nm}
        if not layers:
            raise QatkitError(f"layers: {self.layer_sparsity} leaves no layer to prune; write a share above 0 for one")
        for name, layer in layers.items():
            if self.nm is not None:
                check_nm(name, layer.weight, *self.nm)  # type: ignore[arg-type]  # a Parameter
            if self.block is not None:
                check_block(name, layer.weight, self.block)  # type: ignore[arg-type]  # a Parameter
        return layers

    @override
    def start(self, pl_module: LightningModule) -> None:
        self.check_not_empty(self.select(pl_module))
        self._prune(pl_module, self._level_at(0.0))

    @override
    def resume(self, pl_module: LightningModule, recorded: dict[str, int]) -> None:
        chosen = list(self.select(pl_module))
        if recorded and list(recorded) != chosen:
            raise QatkitError(
                f"include: the checkpoint holds the zeros of {list(recorded)}, the patterns now select {chosen}; "
                "resume with the patterns it was trained with"
            )
        super().resume(pl_module, recorded)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.ramp.end and math.isinf(trainer.estimated_stepping_batches):
            raise QatkitError(
                "ramp: training has no end to take a share of; write Trainer(max_steps=...) or max_epochs"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        level = self._level_at(trainer.global_step / trainer.estimated_stepping_batches) if self.ramp.end else UPDATES
        if level > self._level:
            self._prune(pl_module, level)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.nm is None and self._level < UPDATES:
            warnings.warn(
                f"ramp: training ended at {self._share_at(max(self._level, 0)):.1%} zeros of {self.ramp.final:.1%}; "
                f"let the ramp end before training may stop, such as Ramp({self.ramp.final}, end=0.5)",
                QatkitWarning,
                stacklevel=2,
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"level": self._level, "settings": self._settings()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._level = state_dict["level"]
        for key, value in self._settings().items():
            if state_dict["settings"][key] != value:
                raise QatkitError(
                    f"{key}: the checkpoint was pruned with {state_dict['settings'][key]}, this run would go on with "
                    f"{value}; write what it was, or start from its weights without resuming"
                )

    def _settings(self) -> dict[str, Any]:
        return {
            "ramp": asdict(self.ramp),
            "scope": self.scope,
            "nm": self.nm and list(self.nm),
            "block": self.block and list(self.block),
            "layers": self.layer_sparsity,
        }

    def _ramp_of(self, name: str) -> Ramp:
        share = share_of(name, self.layer_sparsity, self.ramp.final)
        return replace(self.ramp, final=share, initial=min(self.ramp.initial, share))

    def _level_at(self, progress: float) -> int:
        start, end = self.ramp.start, self.ramp.end
        if progress >= end:
            return UPDATES
        # 0.3 - 0.25 is a little less than a tenth of 0.5
        return 0 if progress <= start else math.floor(UPDATES * (progress - start) / (end - start) + 1e-9)

    def _share_at(self, level: int, name: str | None = None) -> float:
        """The sparsity of a level; of one layer, or of all of them."""
        ramp = self.ramp if name is None else self._ramp_of(name)
        if level == 0:
            return ramp.initial
        return ramp.final if level == UPDATES else ramp.at(ramp.start + (ramp.end - ramp.start) * level / UPDATES)

    def _prune(self, pl_module: LightningModule, level: int) -> None:
        """Make the zeros of a level, and hold the layers from then on."""
        self._level = level
        if self.nm is None and not self._share_at(level):
            return  # nothing is pruned yet, so zeros that layers may start with are free to move
        layers = self.select(pl_module)
        weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        # every mask before the first change: after an error the module is still the user's
        for name, mask in self._masks_at(weights, level).items():
            apply_mask(weights[name], mask)
        self.layers = list(layers)

    def _masks_at(self, weights: dict[str, nn.Parameter], level: int) -> dict[str, Tensor]:
        if self.nm is not None:
            return {name: nm_mask(weight, *self.nm, name) for name, weight in weights.items()}
        if self.scope == "model":
            masks = global_masks(weights, self._share_at(level))
            kept = total_counts({name: int(mask.sum()) for name, mask in masks.items()}, weights)
            for name, weight in weights.items():
                check_floor(name, kept[name], weight.numel())
            return masks
        shares = {name: self._share_at(level, name) for name in weights}
        if self.block is not None:
            return {name: block_mask(weight, shares[name], self.block, name) for name, weight in weights.items()}
        return {name: global_masks({name: weight}, shares[name])[name] for name, weight in weights.items()}


class ConstantPruning(HeldZeros):
    """Keeps the zeros that the weights already have, such as those of an earlier stage, and makes none.

    Args:
        include: Globs over layer names of the LightningModule; every one must match a layer.
        exclude: Globs over layer names that are left alone.

    Raises:
        QatkitError: a pattern matches nothing, no selected layer has a zero, one has nothing else, or one resumes with
            other zeros than it was saved with.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks.pruning import ConstantPruning
        >>> trainer = Trainer(callbacks=[ConstantPruning()])
    """

    def __init__(self, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> None:
        super().__init__(include, exclude)

    @override
    def start(self, pl_module: LightningModule) -> None:
        layers = self.select(pl_module)
        weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        self.check_not_empty(layers)
        zeros = count_zeros(weights)
        self.layers = [name for name in layers if zeros[name]]
        if not self.layers:
            raise QatkitError(
                f"include: none of {list(layers)} has a weight of 0, so there is nothing to keep; load pruned weights, "
                "or write MagnitudePruning(sparsity=...)"
            )
