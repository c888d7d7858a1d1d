"""Magnitude pruning of any LightningModule, and a callback that keeps an existing mask."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from qatkit.callbacks.pruning_callback import AVERAGING, PruningCallback
from torch import Tensor, nn
from typing_extensions import override

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.pruning.layers import check_pattern, sparsity_of
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
"""Number of pruning steps in a ramp; training between them recovers the accuracy."""


class MagnitudePruning(PruningCallback):
    """Set the smallest weights to zero, in one step or along a ramp, and keep them at zero.

    Without a ramp, the weights are pruned once before training, which then recovers the accuracy. Masks are exact:
    ``round(sparsity * n)`` of ``n`` weights are zero, and the same weights for any number of processes. Place this
    callback before `QuantizationAwareTraining`, so that quantization ranges are calibrated on the pruned model.

    Args:
        sparsity: Fraction of pruned weights, between 0 and 1 (exclusive). Set exactly one of `sparsity`, `ramp` and
            `nm`.
        scope: "layer" prunes every layer to the same sparsity; "model" ranks the weights of all layers together.
        nm: ``(N, M)`` keeps N of every M consecutive inputs, such as ``(2, 4)``.
        block: Size of the blocks that are pruned as a whole, in rows and columns.
        ramp: Sparsity as a function of training progress.
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.
        layers: Sparsity by glob over layer names, which overrides `sparsity`. The last matching glob wins; 0 leaves a
            layer dense.

    Raises:
        QatkitError: settings conflict; a pattern matches nothing; `nm` or `block` cannot be applied to a layer; a layer
            would lose all its weights; or a resumed layer has a different number of zeros than when it was saved.

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
                f"exactly one of sparsity, ramp and nm is required, got {' and '.join(given) or 'none'}",
                key=given[0] if given else "sparsity",
                advice="pass sparsity=0.5, ramp=Ramp(0.5) or nm=(2, 4)",
            )
        if sparsity is not None:
            check_sparsity("sparsity", sparsity)
        if ramp is not None and not isinstance(ramp, Ramp):
            raise QatkitError(f"{ramp!r} is not a Ramp", key="ramp", advice="use Ramp(0.5)")
        self.ramp = ramp if ramp is not None else Ramp(sparsity or 0.0, end=0.0)
        if nm is not None:
            check_nm_pair(nm)
        if block is not None:
            check_pair("block", block, (16, 16))
        if nm is None and not self.ramp.final:
            raise QatkitError(
                "0.0 prunes nothing",
                key="sparsity" if ramp is None else "ramp.final",
                advice="use a positive fraction, such as 0.5",
            )
        if scope not in ("layer", "model"):
            raise QatkitError(f"'{scope}' is unknown", key="scope", advice="use 'layer' or 'model'")
        self.layer_sparsity = dict(layers or {})
        for other, conflicts in (("scope='model'", scope == "model"), ("nm", nm is not None)):
            if conflicts and self.layer_sparsity:
                raise QatkitError(
                    f"{self.layer_sparsity} has no effect with {other}",
                    key="layers",
                    advice=f"remove either the argument layers or {other}",
                )
        if block is not None and (nm is not None or scope == "model"):
            raise QatkitError(
                f"{block} cannot be combined with nm or scope='model'",
                key="block",
                advice="remove block, or nm and scope",
            )
        if nm is not None and scope == "model":
            raise QatkitError(
                "'model' has no effect with nm, which keeps the same number of weights in every group",
                key="scope",
                advice="remove scope",
            )
        for pattern, fraction in self.layer_sparsity.items():
            check_sparsity(f"layers['{pattern}']", fraction)
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
                f"{type(averaging[0]).__name__} averages weights from before and after pruning, which leaves no zeros",
                key="ramp",
                advice="prune in an earlier call to fit, and keep the mask with ConstantPruning",
            )

    @override
    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        layers = super().select(pl_module)
        for pattern in self.layer_sparsity:
            check_pattern(f"layers['{pattern}']", pattern, list(layers))
        layers = {name: layer for name, layer in layers.items() if self._ramp_of(name).final or self.nm}
        if not layers:
            raise QatkitError(
                f"{self.layer_sparsity} leaves no layer to prune",
                key="layers",
                advice="use a positive fraction for at least one layer",
            )
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
                f"the checkpoint has pruned layers {list(recorded)}, but the patterns now select {chosen}",
                key="include",
                advice="use the checkpoint's patterns",
            )
        super().resume(pl_module, recorded)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.ramp.end and math.isinf(trainer.estimated_stepping_batches):
            raise QatkitError(
                "training has no end, so the progress of the ramp is unknown",
                key="ramp",
                advice="set max_steps or max_epochs on the Trainer",
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
                f"ramp: training ended at a sparsity of {self._sparsity_at(max(self._level, 0)):.1%}, before the ramp "
                f"reached {self.ramp.final:.1%}; end the ramp earlier, such as Ramp({self.ramp.final}, end=0.5)",
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
                before = state_dict["settings"][key]
                raise QatkitError(
                    f"the checkpoint was pruned with {before}, but this run would continue with {value}",
                    key=key,
                    advice=f"use {before}, or load its weights without resuming",
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
        final = sparsity_of(name, self.layer_sparsity, self.ramp.final)
        return replace(self.ramp, final=final, initial=min(self.ramp.initial, final))

    def _level_at(self, progress: float) -> int:
        """Return the pruning step of the ramp, from 0 to `UPDATES`, at a training progress."""
        start, end = self.ramp.start, self.ramp.end
        if progress >= end:
            return UPDATES
        # 0.3 - 0.25 is slightly less than a tenth of 0.5
        return 0 if progress <= start else math.floor(UPDATES * (progress - start) / (end - start) + 1e-9)

    def _sparsity_at(self, level: int, name: str | None = None) -> float:
        """Return the sparsity at a pruning step, of one layer or of all of them."""
        ramp = self.ramp if name is None else self._ramp_of(name)
        if level == 0:
            return ramp.initial
        return ramp.final if level == UPDATES else ramp.at(ramp.start + (ramp.end - ramp.start) * level / UPDATES)

    def _prune(self, pl_module: LightningModule, level: int) -> None:
        """Prune to the sparsity of a pruning step, and keep the mask of these layers from then on."""
        self._level = level
        if self.nm is None and not self._sparsity_at(level):
            return  # nothing is pruned yet, so weights that start at zero may still change
        layers = self.select(pl_module)
        weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        # all masks are computed before the first change, so an error leaves the module unchanged
        for name, mask in self._masks_at(weights, level).items():
            apply_mask(weights[name], mask)
        self.layers = list(layers)

    def _masks_at(self, weights: dict[str, nn.Parameter], level: int) -> dict[str, Tensor]:
        if self.nm is not None:
            return {name: nm_mask(weight, *self.nm, name) for name, weight in weights.items()}
        if self.scope == "model":
            masks = global_masks(weights, self._sparsity_at(level))
            kept = total_counts({name: int(mask.sum()) for name, mask in masks.items()}, weights)
            for name, weight in weights.items():
                check_floor(name, kept[name], weight.numel())
            return masks
        sparsity = {name: self._sparsity_at(level, name) for name in weights}
        if self.block is not None:
            return {name: block_mask(weight, sparsity[name], self.block, name) for name, weight in weights.items()}
        return {name: global_masks({name: weight}, sparsity[name])[name] for name, weight in weights.items()}


class ConstantPruning(PruningCallback):
    """Keep existing zeros, such as those pruned in an earlier stage, without further pruning.

    Args:
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.

    Raises:
        QatkitError: a pattern matches nothing; no selected layer has a zero; a layer is all zeros; or a resumed layer
            has a different number of zeros than when it was saved.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks.pruning import ConstantPruning
        >>> trainer = Trainer(callbacks=[ConstantPruning()])
    """

    prunes = False

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
                f"no weight of {list(layers)} is 0, so there is no mask to keep",
                key="include",
                advice="load pruned weights, or use MagnitudePruning(sparsity=0.5)",
            )
