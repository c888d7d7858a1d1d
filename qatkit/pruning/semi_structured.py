"""2:4 sparse inference on the sparse tensor cores of NVIDIA GPUs, with torch's kernels."""

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
    """Compress the 2:4 sparse weights of linear layers in place, so that they run on sparse kernels.

    This is for inference only: compressed weights cannot be trained, and their state dict has a different format, so
    keep the original checkpoint. Layers with a shape that torch's kernels do not support stay dense, with a warning.

    Args:
        model: A model on a GPU of compute capability 8.0 or higher, in float16 or bfloat16.
        include: Globs over layer names; each must match a layer. Only linear layers among the matches are compressed.
        exclude: Globs over layer names to exclude.

    Returns:
        The names of the layers that run on the sparse kernels.

    Raises:
        QatkitError: a pattern matches nothing; a layer is not on a supported GPU, has an unsupported dtype or is not
            2:4 sparse; or torch supports none of the layers.

    Example:
        >>> # needs a GPU
        >>> names = use_sparse_kernels(model.cuda().bfloat16(), exclude=["lm_head"])  # doctest: +SKIP
    """
    chosen = prunable_layers(model, include, exclude)
    layers = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise QatkitError(
            f"none of the selected layers is linear: {list(chosen)}", key="include", advice="include a linear layer"
        )
    for name, layer in layers.items():
        _check(name, layer.weight)
    compressed, refused = {}, {}
    for name, layer in layers.items():
        try:
            compressed[name] = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except (RuntimeError, ValueError) as error:  # only torch knows the shapes that its kernels support
            refused[name] = str(error).splitlines()[0]
    if not compressed:
        name, reason = next(iter(refused.items()))
        raise QatkitError(
            f"torch has no sparse kernel for any of the layers (layer '{name}': {reason})", advice="use the dense model"
        )
    for name, weight in compressed.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    if refused:
        warnings.warn(
            f"layers {list(refused)} stay dense: torch's kernels do not support their shapes; exclude these layers",
            QatkitWarning,
            stacklevel=2,
        )
    return list(compressed)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 consecutive inputs are nonzero.

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
            f"layer '{name}' is on {part.device.type}, but 2:4 kernels need an NVIDIA GPU",
            advice="use model.cuda(), or the plain weights, which give the same results",
        )
    if torch.cuda.get_device_capability(part.device) < (8, 0):
        raise QatkitError(
            f"layer '{name}' is on {torch.cuda.get_device_name(part.device)}, which has no sparse tensor cores",
            advice="use a GPU of compute capability 8.0 (Ampere) or higher",
        )
    if part.dtype not in DTYPES:
        raise QatkitError(
            f"the weight of layer '{name}' is {part.dtype}", advice="use model.to(torch.bfloat16) or float16"
        )
    if not is_two_of_four(part):
        raise QatkitError(
            f"the weight of layer '{name}', of shape {list(part.shape)}, is not 2:4 sparse",
            advice="prune the layer with nm=(2, 4), or exclude it",
        )
