"""One-shot pruning of a trained model, layer by layer, with calibration batches and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.errors import QatkitError
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, check_floor, check_nm, check_sparsity, nm_mask
from qatkit.pruning.methods import METHODS
from qatkit.pruning.scores import row_mask

LAYERWISE = ("input_norms", "gram")
"""Calibration statistics used by the layer-by-layer methods."""


def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "sparsegpt",
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    forward: Callable[[Any], object] | None = None,
) -> list[str]:
    """Prune the linear layers of `model` in place, block by block.

    A block consists of the layers with the same first number in their names, such as ``model.layers.3``. Its inputs
    come from the preceding pruned blocks, so all batches run once per block. The model must not be distributed. It runs
    in eval mode without gradients; train/eval modes and random states are restored.

    Args:
        model: A trained model.
        batches: Batches to pass to `forward`. They are kept in memory and run once for every block.
        method: "wanda" (Sun et al., 2023) prunes within each output and leaves the other weights unchanged; "sparsegpt"
            (Frantar and Alistarh, 2023) updates the kept weights to compensate, and needs a float32 matrix ``[in, in]``
            for each layer of a block.
        sparsity: Fraction of pruned weights in each layer, from 0 to below 1. Set exactly one of `sparsity` and `nm`.
        nm: ``(N, M)`` keeps N of every M consecutive inputs.
        include: Globs over layer names; each must match a layer. Only linear layers among the matches are pruned.
        exclude: Globs over layer names to exclude.
        forward: Runs the model on one batch. The default is `model(batch)`.

    Returns:
        The names of the pruned layers.

    Raises:
        QatkitError: the method is unknown; a pattern matches nothing; a setting is out of range or cannot be applied to
            a layer; there are no batches; or a layer receives no input, receives non-finite input or would lose all its
            weights. Inputs are checked block by block, so earlier blocks are already pruned when such an error is
            raised.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> prune_one_shot(model, [torch.randn(4, 8)], nm=(2, 4))
        ['0', '2']
    """
    row = METHODS.row(method, "method")
    if row.measures not in LAYERWISE:
        choices = " or ".join(f"'{each.name}'" for each in METHODS.values() if each.measures in LAYERWISE)
        raise QatkitError(f"'{method}' does not prune layer by layer", key="method", advice=f"use {choices}")
    if (sparsity is None) == (nm is None):
        raise QatkitError(
            "exactly one of sparsity and nm is required", key="sparsity", advice="pass sparsity=0.5 or nm=(2, 4)"
        )
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    chosen = prunable_layers(model, include, exclude)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise QatkitError(
            f"none of the selected layers is linear: {list(chosen)}", key="include", advice="include a linear layer"
        )
    for name, layer in layers.items():
        if nm is not None:
            check_nm(name, layer.weight, *nm)
        else:
            total, width = layer.weight.numel(), layer.weight.shape[1]
            fraction, by_row = sparsity or 0.0, row.measures == "input_norms"
            pruned = round(fraction * width) * (total // width) if by_row else round(fraction * total)
            check_floor(name, total - pruned, total)
    kept = list(batches)
    if not kept:
        raise QatkitError("no batches were passed", key="batches", advice="pass a few batches of training data")
    function = implementation(row.function)
    for _, names in groupby(layers, key=_block):
        block = {name: layers[name] for name in names}
        sums = _input_sums(model, block, kept, forward or model, gram=row.measures == "gram")
        for name, layer in block.items():
            if row.measures == "gram":
                layer.weight.data.copy_(function(layer.weight, sums[name], sparsity, nm))
                continue
            scores = function(layer.weight, sums[name].sqrt())
            apply_mask(layer.weight, nm_mask(scores, *nm) if nm is not None else row_mask(scores, sparsity or 0.0))
    return list(layers)


def check_linear(method: str, layers: Mapping[str, nn.Module]) -> None:
    """Raise an error if a layer is not linear."""
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise QatkitError(
                f"'{method}' prunes only linear layers, but layer '{name}' is a {type(layer).__name__}",
                advice="exclude the layer",
            )


def _block(name: str) -> str:
    """Cut a layer name after its first number; keep the whole name if it has none."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _input_sums(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    batches: list[Any],
    forward: Callable[[Any], object],
    gram: bool,
) -> dict[str, Tensor]:
    """Compute ``X.T @ X`` over all inputs of each layer, float32; without `gram`, its diagonal (squared norms)."""
    sums: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):  # autocast would compute the product in bfloat16
                products = x.t() @ x if gram else x.square().sum(dim=0)
            sums[name] = sums[name] + products if name in sums else products

        return add

    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    unreached = [name for name in layers if name not in sums]
    if unreached:
        raise QatkitError(
            f"the batches never reach layer '{unreached[0]}'", advice="exclude the layer, or pass batches that reach it"
        )
    non_finite = [name for name, total in sums.items() if not total.isfinite().all()]
    if non_finite:
        raise QatkitError(
            f"the inputs of layer '{non_finite[0]}' are non-finite on the calibration batches",
            advice="use other batches, or a model whose training did not diverge",
        )
    return sums
