"""BatchNorm folding: merge BatchNorm into the preceding convolution before quantization."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qatkit.errors import QatkitWarning

Fold = tuple[str, str]

_NORMS: dict[type[nn.Module], type[_BatchNorm]] = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d
}  # fmt: skip
"""Foldable pairs of convolution and BatchNorm; after a linear layer, BatchNorm1d may normalize tokens instead."""


def fold_batchnorm(model: nn.Module) -> list[Fold]:
    """Fold every BatchNorm that follows a convolution into the convolution, in place.

    Outputs in eval mode are unchanged. The convolution keeps its name and gains a bias; the BatchNorm becomes
    `nn.Identity`. Pairs are found by tracing with `torch.fx`; if the model cannot be traced, its submodules are traced
    instead.

    Returns:
        The ``(convolution, batchnorm)`` names of each pair, for `replay_folds`.

    Example:
        >>> from torch import nn
        >>> fold_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        [('0', '1')]
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return []
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    folds = [
        fold for fold in _find(model, "") if uses[id(model.get_submodule(fold[0]).weight)] == 1
    ]  # only weights that are used once (not tied)
    for conv_name, bn_name in folds:
        conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        assert isinstance(bn, _BatchNorm)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        with torch.no_grad():
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
        # torch returns a new bias frozen, but it replaces BatchNorm's trainable shift
        trains = conv.weight.requires_grad or (bn.weight is not None and bn.weight.requires_grad)
        conv.weight = nn.Parameter(weight.detach(), requires_grad=trains)
        conv.bias = nn.Parameter(bias.detach(), requires_grad=trains)
        model.set_submodule(bn_name, nn.Identity())
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        warnings.warn(
            "BatchNorm layers were not folded, because they do not directly follow a Conv1d, Conv2d or Conv3d, or "
            f"because torch.fx cannot trace their module: {left}; these layers stay in floating point",
            QatkitWarning,
            stacklevel=2,
        )
    return folds


def replay_folds(model: nn.Module, folds: Sequence[Fold]) -> None:
    """Repeat the structural changes of `fold_batchnorm`, so that a folded checkpoint can be loaded."""
    for conv_name, bn_name in folds:
        conv = model.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if conv.bias is None:
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, device=conv.weight.device, dtype=conv.weight.dtype))
        model.set_submodule(bn_name, nn.Identity())


def _find(module: nn.Module, prefix: str) -> list[Fold]:
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return []
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # tracing can fail in any way in user code; submodules may still be traceable
        return [pair for name, child in module.named_children() for pair in _find(child, f"{prefix}{name}.")]
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    folds = []
    for node in calls:
        before = node.args[0] if node.args else None
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
            and times[str(node.target)] == times[str(before.target)] == 1
            and type(bn := module.get_submodule(str(node.target)))
            is _NORMS.get(type(module.get_submodule(str(before.target))))
            and bn.running_mean is not None
        ):
            folds.append((f"{prefix}{before.target}", f"{prefix}{node.target}"))
    return folds
