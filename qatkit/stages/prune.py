"""The ``prune`` block, and the zeros that later stages hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import check_pattern, prunable_layers, share_of
from qatkit.pruning.masks import check_block, check_floor, check_nm
from qatkit.pruning.one_shot import check_linear
from qatkit.pruning.schedule import Ramp
from qatkit.recipe import PruneConfig
from qatkit.stages.layer_names import inside, inside_keys
from qatkit.tasks import mean_loss

if TYPE_CHECKING:
    from qatkit.callbacks.held_zeros import HeldZeros


def check(config: PruneConfig, model: nn.Module) -> list[str]:
    """The layers that are pruned, after everything that can be known of them was checked."""
    chosen = prunable_layers(model, config.include, config.exclude)
    if config.method in ("wanda", "sparsegpt"):
        check_linear(config.method, chosen)
    for pattern in config.layers:
        check_pattern(f"layers['{pattern}']", pattern, list(chosen))
    for layer, module in chosen.items():
        weight = cast(Tensor, module.weight)
        if config.nm is not None:
            check_nm(layer, weight, config.nm[0], config.nm[1])
        if config.block is not None:
            check_block(layer, weight, (config.block[0], config.block[1]))
    if config.nm is None:
        _check_shares(config, {layer: cast(Tensor, module.weight) for layer, module in chosen.items()})
    return list(chosen)


def _check_shares(config: PruneConfig, weights: Mapping[str, Tensor]) -> None:
    """Whether something is pruned, and as far as it is known before training, something left."""
    share = config.sparsity if config.ramp is None else config.ramp.final
    assert share is not None
    if config.scope == "model":  # how much of each layer goes depends on its values
        total = sum(weight.numel() for weight in weights.values())
        check_floor(", ".join(weights), total - round(share * total), total)
        return
    shares = {layer: share_of(layer, config.layers, share) for layer in weights}
    if not any(shares.values()):
        raise QatkitError(f"layers: {dict(config.layers)} leaves no layer to prune; write a share above 0 for one")
    for layer, weight in weights.items():
        total = weight.numel()
        if config.block is not None:
            total //= config.block[0] * config.block[1] * (weight[0, 0].numel())
        check_floor(layer, total - round(shares[layer] * total), total)


def callbacks(config: PruneConfig | None, held: Sequence[str], model: nn.Module) -> list[HeldZeros]:
    """What prunes, and what holds the zeros of earlier stages meanwhile.

    Args:
        config: The stage's block, if it has one.
        held: Layers whose zeros an earlier stage made. All of them stay through any method but srste, whose zeros may
            change in the layers that it prunes.
        model: The model at the stage's start.
    """
    from qatkit.callbacks import ConstantPruning

    # over a model, or where a ramp has not begun, a layer may be among the pruned ones without a zero
    held = [layer for layer in held if bool((model.get_submodule(layer).weight == 0).any())]  # type: ignore[union-attr]  # a Parameter
    if config is None:
        return [ConstantPruning(inside(held))] if held else []
    chosen = prunable_layers(model, config.include, config.exclude)
    pruned = {name for name in chosen if share_of(name, config.layers, 1.0)}
    # a ramp holds nothing before its first zeros; what prunes at once holds its layers, old zeros and new, by itself
    left = [layer for layer in held if config.ramp is not None or layer not in pruned]
    return [*([ConstantPruning(inside(left))] if left else []), _pruning(config)]


def _pruning(config: PruneConfig) -> HeldZeros:
    from qatkit.callbacks import MagnitudePruning, MovementPruning, OneShotPruning, SparseRefinedSTE

    nm = None if config.nm is None else (config.nm[0], config.nm[1])
    ramp = None if config.ramp is None else Ramp(**asdict(config.ramp))
    include, exclude = inside(config.include), inside(config.exclude)
    if config.method == "movement":
        assert ramp is not None
        return MovementPruning(ramp, config.scope, include, exclude)
    if config.method == "srste":
        assert nm is not None
        return SparseRefinedSTE(nm, include=include, exclude=exclude)
    if config.method != "magnitude":
        loss = mean_loss if config.method == "taylor" else None
        return OneShotPruning(
            config.method, config.sparsity, nm, config.scope, include, exclude, config.calibration_batches, loss
        )
    return MagnitudePruning(
        sparsity=config.sparsity,
        scope=config.scope,
        nm=nm,
        block=None if config.block is None else (config.block[0], config.block[1]),
        ramp=ramp,
        include=include,
        exclude=exclude,
        layers=inside_keys(config.layers),
    )
