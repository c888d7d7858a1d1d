"""Prune a trained model at once, without training: layer by layer, on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_mask, check_floor, check_nm, check_sparsity, nm_mask
from qatkit.pruning.scores import row_mask, wanda_scores
from qatkit.pruning.sparsegpt import sparsegpt

Method = Literal["wanda", "sparsegpt"]


def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Any],
    method: Method = "sparsegpt",
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    forward: Callable[[Any], object] | None = None,
) -> list[str]:
    """Prune the linear layers of `model` in place, block by block: each one sees what the pruned blocks before it give.

    A block is what a number in the layers' names counts, such as ``model.layers.3``; all batches run once for each.
    Runs in eval mode without gradients; modes and random number generators are put back. For a model on one process.

    Args:
        model: A trained model.
        batches: What `forward` takes; they are kept, and run once for every block.
        method: "wanda" (Sun et al., 2023) prunes within each output and leaves the other weights as they are;
            "sparsegpt" (Frantar and Alistarh, 2023) makes up for what it prunes, and keeps ``[in, in]`` numbers for
            each layer of a block.
        sparsity: Share of zeros in each layer, from 0 to below 1; give it or `nm`.
        nm: ``(N, M)`` keeps N of every M neighbouring inputs.
        include: Globs over layer names; every one must match a layer. Of the matched layers the linear ones are pruned.
        exclude: Globs over layer names that are left alone.
        forward: Runs the model on one batch; `model(batch)` by default.

    Returns:
        The names of the pruned layers.

    Raises:
        QatkitError: a pattern matches nothing, settings are out of range or do not fit a layer, no batches, or a layer
            that they never reach, whose inputs are not finite or that would lose all its weights. What the batches
            show is seen block by block, so after such an error the blocks before are pruned.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> prune_one_shot(model, [torch.randn(4, 8)], nm=(2, 4))
        ['0', '2']
    """
    if method not in ("wanda", "sparsegpt"):
        raise QatkitError(f"method: '{method}' is unknown; write 'wanda' or 'sparsegpt'")
    if (sparsity is None) == (nm is None):
        raise QatkitError("prune_one_shot: write one of sparsity=0.5 and nm=(2, 4)")
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    chosen = prunable_layers(model, include, exclude)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise QatkitError(f"include {list(include)} selects {list(chosen)}, of which none is linear")
    for name, layer in layers.items():
        if nm is not None:
            check_nm(name, layer.weight, *nm)
        else:
            total, width = layer.weight.numel(), layer.weight.shape[1]
            share = sparsity or 0.0
            pruned = round(share * width) * (total // width) if method == "wanda" else round(share * total)
            check_floor(name, total - pruned, total)
    kept = list(batches)
    if not kept:
        raise QatkitError("prune_one_shot: there are no batches; pass a few that the model was trained on")
    for _, names in groupby(layers, key=_block):
        block = {name: layers[name] for name in names}
        seen = _inputs(model, block, kept, forward or model, gram=method == "sparsegpt")
        for name, layer in block.items():
            if method == "sparsegpt":
                layer.weight.data.copy_(sparsegpt(layer.weight, seen[name], sparsity, nm))
                continue
            scores = wanda_scores(layer.weight, seen[name].sqrt())
            apply_mask(layer.weight, nm_mask(scores, *nm) if nm is not None else row_mask(scores, sparsity or 0.0))
    return list(layers)


def check_linear(method: str, layers: Mapping[str, nn.Module]) -> None:
    """Raise if one of the layers is not linear."""
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise QatkitError(
                f"layer '{name}': '{method}' prunes linear layers, and this is a {type(layer).__name__}; exclude the "
                "layer"
            )


def _block(name: str) -> str:
    """The name up to its first number; the whole name where there is none."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _inputs(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    batches: list[Any],
    forward: Callable[[Any], object],
    gram: bool,
) -> dict[str, Tensor]:
    """``X.T @ X`` over all inputs of each layer, float32; only its diagonal, the squared norms, without `gram`."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            with torch.autocast(
                x.device.type, enabled=False
            ):  # in which products would be bfloat16, and their sums too
                found = x.t() @ x if gram else x.square().sum(dim=0)
            sums[name] = sums[name] + found if name in sums else found

        return add

    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
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
    missed = [name for name in layers if name not in sums]
    if missed:
        raise QatkitError(f"layer '{missed[0]}': the batches never reach it; exclude it, or pass batches that do")
    strange = [name for name, found in sums.items() if not found.isfinite().all()]
    if strange:
        raise QatkitError(
            f"layer '{strange[0]}': its inputs are NaN or infinite on the batches; the training diverged, or they hold "
            "such values: pass others"
        )
    return sums
