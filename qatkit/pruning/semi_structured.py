"""Run 2:4 sparse layers through the sparse tensor cores of NVIDIA GPUs, with torch's own kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.shards import local

DTYPES = (torch.float16, torch.bfloat16)


def use_sparse_kernels(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[str]:
    """Give linear layers whose weights are 2:4 sparse a compressed weight, whose products take the sparse kernels.

    For inference, in place: the weights are no longer trained, nor saved as plain ones. Keep the plain checkpoint.
    Layers of a shape that torch's kernels do not take stay as they are, with a warning.

    Args:
        model: On a GPU of compute capability 8.0 or more, in float16 or bfloat16.
        include: Globs over layer names; every one must match a layer. Of the matched layers the linear ones are taken.
        exclude: Globs over layer names that are left alone.

    Returns:
        The names of the layers that take the sparse kernels.

    Raises:
        QatkitError: a pattern matches nothing; a layer is not on such a GPU, of another dtype, or not 2:4 sparse; or
            torch takes none of them.

    Example:
        >>> names = use_sparse_kernels(model.cuda().bfloat16(), exclude=["lm_head"])  # doctest: +SKIP
    """
    chosen = prunable_layers(model, include, exclude)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise QatkitError(f"include {list(include)} selects {list(chosen)}, of which none is linear")
    for name, layer in layers.items():
        _check(name, layer.weight)
    taken, refused = {}, {}
    for name, layer in layers.items():
        try:
            taken[name] = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except (RuntimeError, ValueError) as error:  # torch knows which shapes its kernels take
            refused[name] = str(error).splitlines()[0]
    if not taken:
        name, reason = next(iter(refused.items()))
        raise QatkitError(f"layer '{name}': torch has no sparse kernel for it, nor for any other layer ({reason})")
    for name, weight in taken.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    if refused:
        warnings.warn(
            f"layers {list(refused)} stay dense: torch's sparse kernels do not take their shapes; exclude them",
            QatkitWarning,
            stacklevel=2,
        )
    return list(taken)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 neighbouring inputs are not 0.

    Example:
        >>> is_two_of_four(torch.tensor([[0.0, 1.0, 2.0, 0.0]]))
        True
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(dim=2) <= 2).all())


def _check(name: str, weight: Tensor) -> None:
    part = local(weight)
    if part.device.type != "cuda":
        raise QatkitError(
            f"layer '{name}': it is on {part.device.type}, and 2:4 kernels need an NVIDIA GPU; write model.cuda(), or "
            "go on with the plain weights, whose results are the same"
        )
    if torch.cuda.get_device_capability(part.device) < (8, 0):
        raise QatkitError(
            f"layer '{name}': {torch.cuda.get_device_name(part.device)} has no sparse tensor cores; they came with "
            "compute capability 8.0 (Ampere)"
        )
    if part.dtype not in DTYPES:
        raise QatkitError(f"layer '{name}': its weight is {part.dtype}; write model.to(torch.bfloat16) or float16")
    if not is_two_of_four(part):
        raise QatkitError(
            f"layer '{name}': its weight of shape {list(part.shape)} is not 2:4 sparse; prune it with nm=(2, 4), or "
            "exclude the layer"
        )
