"""The ``shrink`` block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.distillation.students import depth_of, student_from_teacher
from qatkit.errors import QatkitError
from qatkit.pruning.axes import build_like, prefix_of
from qatkit.pruning.channel_importance import last_layer
from qatkit.pruning.channels import check_channels, prune_channels
from qatkit.pruning.methods import IMPORTANCES
from qatkit.pruning.structure import Importance, Shape, shrink
from qatkit.recipe import ShrinkConfig

Model = TypeVar("Model", bound=nn.Module)


def check(config: ShrinkConfig, model: nn.Module) -> nn.Module:
    """Check the block, and return the model to train, on torch's meta device.

    With `channels`, the model is returned unchanged, because channel pruning needs actual weights.

    Raises:
        QatkitError: the model cannot be shrunk to these sizes.
    """
    if config.channels is not None:
        if not callable(getattr(model, "arguments", None)):
            raise QatkitError(
                f"{type(model).__name__} has no arguments() method, so its new sizes cannot be recorded",
                key="channels",
                advice="add an arguments() method that returns the factory arguments, as in qatkit.models.vision",
            )
        check_channels(model, config.exclude, 1 - config.channels)
        if find_spec("torch_pruning") is None:
            raise QatkitError(
                "channel pruning requires Torch-Pruning", key="channels", advice="run: pip install torch-pruning"
            )
        return model
    with torch.device("meta"), _argument_keys_dropped():
        smaller = _fewer_layers(config, model)
        if (shape := _shape(config, smaller)) != Shape():
            sizes: Any = smaller.config
            count = sizes.num_hidden_layers
            equal = Importance(
                layers=torch.zeros(count, device="cpu"),
                hidden=torch.zeros(sizes.hidden_size, device="cpu"),
                neurons=torch.zeros(count, sizes.intermediate_size, device="cpu"),
                heads=torch.zeros(count, sizes.num_attention_heads, device="cpu"),
            )
            smaller = shrink(smaller, equal, shape)
        elif smaller is not model and hasattr(smaller.config, "to_dict"):  # it must be loadable from its config
            build_like(model, copy.deepcopy(smaller.config), smaller.state_dict())
    if sum(p.numel() for p in smaller.parameters()) == sum(p.numel() for p in model.parameters()):
        raise QatkitError("the model already has these sizes", advice="use smaller sizes")
    return smaller


@contextmanager
def _argument_keys_dropped() -> Iterator[None]:
    """Drop the key ``model`` from errors: it is an argument of the pruning functions, not a key of the block."""
    try:
        yield
    except QatkitError as error:
        raise (error.with_fields(key="") if error.key == "model" else error) from error.__cause__


def apply(
    config: ShrinkConfig,
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
) -> nn.Module:
    """Build the smaller model.

    Args:
        config: The block.
        model: A model with plain layers; it is not changed.
        batches: Training batches on which importance is measured.
        call: Returns the outputs of a model for a batch.
        loss: Returns the loss of a model on a batch.
    """
    if config.channels is not None:
        return _fewer_channels(config, model, batches, call, loss)
    smaller = _fewer_layers(config, model)
    shape = _shape(config, smaller)
    if shape == Shape():
        return smaller
    scores = _measured(IMPORTANCES[config.importance].transformer, config, smaller, batches, call, loss)
    return shrink(smaller, scores, shape)


def _measured(
    function: str,
    config: ShrinkConfig,
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
) -> Any:
    """Call an importance function of the table with the arguments that its measure needs."""
    measures = IMPORTANCES[config.importance].measures
    if not measures:
        return implementation(function)(model)
    run = loss if measures == "loss" else call
    return implementation(function)(model, batches, lambda batch: run(model, batch))


def _fewer_layers(config: ShrinkConfig, model: Model) -> Model:
    """Remove layers by position, from any transformers model with one stack of layers."""
    if config.keep_layers is None and (config.layers is None or config.layers_by == "score"):
        return model
    key = "layers" if config.keep_layers is None else "keep_layers"
    try:
        depth = depth_of(model)
    except QatkitError as error:
        raise error.with_fields(key=key, advice="set the stage's own model instead") from None
    if config.keep_layers is not None:
        kept = config.keep_layers
        if not kept or kept != sorted({*kept} & {*range(depth)}):
            raise QatkitError(
                f"{kept} is not an ascending list of indices of the model's {depth} layers",
                key=key,
                advice=f"use indices from 0 to {depth - 1}",
            )
        return student_from_teacher(model, kept)
    assert config.layers is not None
    assert config.layers_by != "score"
    size = _size(config.layers, depth)
    if size > depth:
        raise QatkitError(f"{size} is out of range", key=key, advice=f"use an integer from 1 to {depth}")
    return student_from_teacher(model, size, config.layers_by)


def _shape(config: ShrinkConfig, model: nn.Module) -> Shape:
    """Return the target sizes of the parts that importance selects."""
    by_score = config.layers if config.layers_by == "score" else None
    keys = [
        *(["layers"] if by_score is not None else []),
        *(key for key in ("heads", "kv_heads", "neurons", "hidden") if getattr(config, key) is not None),
    ]
    if not keys:
        return Shape()
    try:
        prefix_of(model)
    except QatkitError as error:
        advice = None if hasattr(model, "config") else "use channels: 0.5 for a convolutional network"
        raise error.with_fields(key=keys[0], advice=advice) from None
    sizes: Any = model.config
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    wanted = None if config.heads is None else _size(config.heads, heads)
    kept = None if config.kv_heads is None else _size(config.kv_heads, groups)
    if wanted is not None and kept is None and wanted % (heads // groups) == 0:
        kept = wanted * groups // heads
    return Shape(
        layers=None if by_score is None else _size(by_score, sizes.num_hidden_layers),
        hidden=None if config.hidden is None else _size(config.hidden, sizes.hidden_size),
        neurons=None if config.neurons is None else _size(config.neurons, sizes.intermediate_size),
        heads=wanted,
        kv_heads=kept,
    )


def _size(wanted: int | float, whole: int) -> int:
    """Convert a size of the block to a number of parts, at least 1."""
    return wanted if isinstance(wanted, int) else max(1, round(wanted * whole))


def _fewer_channels(
    config: ShrinkConfig,
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
) -> nn.Module:
    """Remove channels of a convolutional network; the layer that runs last keeps all of its channels."""
    assert config.channels is not None
    batch = batches[0]
    if isinstance(batch, Mapping):
        raise QatkitError(
            f"channel pruning needs a model with a single input, but a batch has {', '.join(sorted(batch))}",
            key="channels",
            advice="use layers, heads, neurons or hidden for a transformer",
        )
    example = batch[0][:1]
    function = IMPORTANCES[config.importance].channels
    scores = _measured(function, config, model, batches, call, loss) if function else None
    exclude = [*config.exclude, last_layer(model, example)]
    return prune_channels(model, example, 1 - config.channels, exclude, scores=scores)
