"""Prepare a model for a runtime: quantize layers, and the tensors that its integer kernels read or write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qatkit.quantization.folding import Fold, fold_batchnorm
from qatkit.quantization.placement.points import Placement, place
from qatkit.quantization.placement.recorder import record
from qatkit.quantization.placement.rules import decide
from qatkit.quantization.prepare import prepare_qat
from qatkit.quantization.selection import select
from qatkit.quantization.targets import TARGETS, Target, check_placed
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec


def fold_and_find(
    model: nn.Module,
    forward: Callable[[], object],
    schemes: Mapping[str, Scheme],
    activation: QuantSpec,
    target: Target,
) -> tuple[list[Fold], Placement]:
    """Fold BatchNorm in place, and return the folded pairs and the outputs to quantize.

    If the forward pass fails, the model is left unchanged.

    Args:
        model: The model, with plain layers.
        forward: Runs the model on one batch.
        schemes: The planned quantization by layer name.
        activation: Quantization of the outputs. Layers whose input has a different quantization are not counted as
            readers.
        target: The runtime.
    """
    layers = [name for name, each in schemes.items() if each.weight is not None and each.activation == activation]
    recording = record(model, forward)
    if folds := fold_batchnorm(model):
        recording = record(model, forward)
    return folds, decide(recording, layers, activation, target)


def prepare_for_target(
    model: nn.Module,
    target: str,
    example: Any,
    weight: QuantSpec | None = None,
    activation: QuantSpec | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    layers: Mapping[str, Scheme] | None = None,
) -> list[str]:
    """Fake-quantize in place all parts of a model that a runtime computes with integers.

    BatchNorm is folded, and layers are fake-quantized as by `prepare_qat`. The outputs that integer kernels write are
    also fake-quantized: the outputs of convolutions, and of residual additions, concatenations and pooling between
    them.

    Args:
        model: Any module.
        target: A name in `qatkit.quantization.TARGETS`, such as "onnxruntime".
        example: One input of the model: a tensor, a tuple of arguments, or a dict of keyword arguments.
        weight: Quantization of weights, which overrides the target's.
        activation: Quantization of activations, which overrides the target's; must be per-tensor. If it is dynamic,
            only layer inputs are quantized.
        include: Globs over layer names; each must match a layer.
        exclude: Globs over names of layers to leave unquantized; each must match a layer.
        layers: Quantization by glob; the last matching glob wins.

    Returns:
        The names of the fake-quantized layers in model order.

    Raises:
        QatkitError: The target is unknown, or for the same reasons as in `prepare_qat`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from qatkit.quantization.placement.points import placement_of
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> prepare_for_target(model, "onnxruntime", torch.zeros(1, 1, 8, 8))
        ['0', '3']
        >>> [f"{point.module}: {point.part}" for point in placement_of(model).points]
        ['2: output', '3: output']
    """
    row = TARGETS.row(target, "target")
    how = (weight or row.weight, activation or row.activation, include, exclude, layers)
    check_placed(how[1], target)
    if how[1] is None or how[1].scaled_per_batch:
        fold_batchnorm(model)
        return prepare_qat(model, *how)
    schemes = select(model, *how)
    placement = fold_and_find(model, lambda: call(model, example), schemes, how[1], row)[1]
    names = prepare_qat(model, *how)
    place(model, placement)
    return names


def call(model: nn.Module, example: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)
