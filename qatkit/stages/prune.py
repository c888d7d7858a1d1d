"""The ``prune`` block, and the sparsity masks that later stages keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.pruning.layers import check_pattern, prunable_layers, sparsity_of, warn_of_unprunable
from qatkit.pruning.masks import check_block, check_floor, check_nm
from qatkit.pruning.one_shot import check_linear
from qatkit.pruning.schedule import Ramp
from qatkit.recipe import PruneConfig
from qatkit.stages.layer_names import inside, inside_keys
from qatkit.tasks import Task, mean_loss

if TYPE_CHECKING:
    from qatkit.callbacks.pruning_callback import PruningCallback


def check(config: PruneConfig, model: nn.Module) -> list[str]:
    """Run the block's checks that are possible before training, and warn about layers that it cannot prune.

    Args:
        config: The block.
        model: The stage's input model; it may be on torch's meta device.

    Returns:
        The names of the layers to prune.
    """
    chosen = prunable_layers(model, config.include, config.exclude)
    if config.row.linear_only:
        check_linear(config.method, chosen)
    for pattern in config.layers:
        check_pattern(f"layers['{pattern}']", pattern, list(chosen))
    for layer, module in chosen.items():
        weight = cast(Tensor, module.weight)
        if config.nm is not None:
            check_nm(layer, weight, config.nm[0], config.nm[1])
        if config.block is not None:
            check_block(layer, weight, (config.block[0], config.block[1]))
    warn_of_unprunable(model, config.include, config.exclude)
    if config.nm is None:
        _check_sparsity(config, {layer: cast(Tensor, module.weight) for layer, module in chosen.items()})
    return list(chosen)


def _check_sparsity(config: PruneConfig, weights: Mapping[str, Tensor]) -> None:
    """Check that at least one layer is pruned, and that no layer loses all its weights."""
    sparsity = config.sparsity if config.ramp is None else config.ramp.final
    assert sparsity is not None
    if config.scope == "model":  # the sparsity of each layer depends on its values
        total = sum(weight.numel() for weight in weights.values())
        check_floor(", ".join(weights), total - round(sparsity * total), total)
        return
    by_layer = {layer: sparsity_of(layer, config.layers, sparsity) for layer in weights}
    if not any(by_layer.values()):
        raise QatkitError(
            f"{dict(config.layers)} leaves no layer to prune",
            key="layers",
            advice="use a positive fraction for at least one layer",
        )
    for layer, weight in weights.items():
        total = weight.numel()
        if config.block is not None:
            total //= config.block[0] * config.block[1] * (weight[0, 0].numel())
        check_floor(layer, total - round(by_layer[layer] * total), total)


def callbacks(
    config: PruneConfig | None, pruned: Sequence[str], model: nn.Module, task: Task | None
) -> list[PruningCallback]:
    """Build the callbacks that prune and the callbacks that keep the masks of earlier stages.

    Args:
        config: The stage's block, if it has one.
        pruned: Layers that an earlier stage pruned. Their masks are kept with every method except srste, which may
            change the masks of the layers that it prunes.
        model: The model at the stage's start.
        task: The task that the data declares.
    """
    from qatkit.callbacks import ConstantPruning

    # with scope: model, or before a ramp has begun, a pruned layer may have no zeros
    sparse = [layer for layer in pruned if bool((model.get_submodule(layer).weight == 0).any())]  # type: ignore[union-attr]  # a Parameter
    if config is None:
        return [ConstantPruning(inside(sparse))] if sparse else []
    chosen = prunable_layers(model, config.include, config.exclude)
    selected = {name for name in chosen if sparsity_of(name, config.layers, 1.0)}
    # a ramp keeps no zeros before its first pruning step; one-shot methods keep old and new zeros of their layers
    constant = [layer for layer in sparse if config.ramp is not None or layer not in selected]
    return [*([ConstantPruning(inside(constant))] if constant else []), _pruning(config, task)]


def _pruning(config: PruneConfig, task: Task | None) -> PruningCallback:
    """Make the callback of the block's method, with the settings that the method takes."""
    row = config.row
    settings: dict[str, Any] = {
        "sparsity": config.sparsity,
        "ramp": None if config.ramp is None else Ramp(**asdict(config.ramp)),
        "nm": None if config.nm is None else (config.nm[0], config.nm[1]),
        "scope": config.scope,
        "block": None if config.block is None else (config.block[0], config.block[1]),
        "layers": inside_keys(config.layers),
        "calibration_batches": config.calibration_batches,
    }
    arguments = {key: settings[key] for key in row.keys}
    arguments |= {"include": inside(config.include), "exclude": inside(config.exclude)}
    if row.callback:
        return cast("PruningCallback", implementation(row.callback)(**arguments))
    from qatkit.callbacks import OneShotPruning

    loss = partial(mean_loss, declared=task) if row.measures == "gradients" else None
    return OneShotPruning(config.method, **arguments, calibration_forward=loss)
