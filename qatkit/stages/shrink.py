"""The ``shrink`` block."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qatkit.distillation.students import depth_of, student_from_teacher
from qatkit.errors import QatkitError
from qatkit.pruning.axes import build_like, prefix_of
from qatkit.pruning.channel_scores import channel_scores, last_layer
from qatkit.pruning.channels import check_channels, prune_channels
from qatkit.pruning.structure import Importance, Shape, importance, shrink
from qatkit.pruning.weight_importance import magnitude_importance, taylor_importance
from qatkit.recipe import ShrinkConfig

Model = TypeVar("Model", bound=nn.Module)


def check(config: ShrinkConfig, model: nn.Module) -> nn.Module:
    """A model on torch's meta device as the stage will train it; where channels are cut, as it was.

    Raises:
        QatkitError: the model cannot be cut so.
    """
    if config.channels is not None:
        if not callable(getattr(model, "arguments", None)):
            raise QatkitError(
                f"channels: {type(model).__name__} has no method arguments() that says what its factory would make its "
                "like from, so its new sizes could not be written down; add one, as qatkit.models.vision has"
            )
        check_channels(model, config.exclude, 1 - config.channels)
        if find_spec("torch_pruning") is None:
            raise QatkitError("channels: they are cut out by Torch-Pruning; pip install torch-pruning")
        return model
    with torch.device("meta"):
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
            smaller = _in_words_of_the_block(lambda: shrink(smaller, equal, shape))
        elif smaller is not model and hasattr(smaller.config, "to_dict"):  # its config is what it is loaded from
            _in_words_of_the_block(lambda: build_like(model, copy.deepcopy(smaller.config), smaller.state_dict()))
    if sum(p.numel() for p in smaller.parameters()) == sum(p.numel() for p in model.parameters()):
        raise QatkitError("the sizes are those that the model has, so nothing is cut; write smaller ones")
    return smaller


def apply(
    config: ShrinkConfig,
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
) -> nn.Module:
    """The smaller model; the old one stays as it is.

    Args:
        config: The block.
        model: With plain layers.
        batches: Training batches that importance is measured on.
        call: The outputs of a model for a batch.
        loss: The loss of a model on a batch.
    """
    if config.channels is not None:
        return _fewer_channels(config, model, batches, call, loss)
    smaller = _fewer_layers(config, model)
    shape = _shape(config, smaller)
    if shape == Shape():
        return smaller
    if config.importance == "magnitude":
        scores = magnitude_importance(smaller)
    elif config.importance == "taylor":
        scores = taylor_importance(smaller, batches, lambda batch: loss(smaller, batch))
    else:
        scores = importance(smaller, batches, lambda batch: call(smaller, batch))
    return shrink(smaller, scores, shape)


def _fewer_layers(config: ShrinkConfig, model: Model) -> Model:
    """Layers that are dropped by their place: a student by layers, of any model of transformers with one stack."""
    if config.keep_layers is not None:
        return student_from_teacher(model, config.keep_layers)
    if config.layers is None or config.layers_by == "score":
        return model
    return student_from_teacher(model, _size(config.layers, depth_of(model)), config.layers_by)


def _shape(config: ShrinkConfig, model: nn.Module) -> Shape:
    """The sizes that importance decides about."""
    by_score = config.layers if config.layers_by == "score" else None
    wanting = ("heads", "kv_heads", "neurons", "hidden")
    keys = [
        *(["layers"] if by_score is not None else []),
        *(key for key in wanting if getattr(config, key) is not None),
    ]
    if not keys:
        return Shape()
    try:
        prefix_of(model)
    except QatkitError as error:
        network = "" if hasattr(model, "config") else "; for convolutional networks write channels: 0.5"
        raise QatkitError(f"{keys[0]}: {str(error).removeprefix('model: ')}{network}") from None
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
        groups=kept,
    )


def _in_words_of_the_block(cut: Callable[[], nn.Module]) -> nn.Module:
    try:
        return cut()
    except QatkitError as error:
        said = re.sub(r"^(model: |shape\.)", "", re.sub(r"^shape\.groups", "kv_heads", str(error)))
        raise QatkitError(said) from None


def _size(wanted: int | float, whole: int) -> int:
    """A number is itself, a share that of the whole; never 0."""
    return wanted if isinstance(wanted, int) else max(1, round(wanted * whole))


def _fewer_channels(
    config: ShrinkConfig,
    model: nn.Module,
    batches: Sequence[Any],
    call: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[nn.Module, Any], Tensor],
) -> nn.Module:
    assert config.channels is not None
    batch = batches[0]
    if isinstance(batch, Mapping):
        raise QatkitError(f"channels: they are for models of one input, and a batch of the data holds {sorted(batch)}")
    example = batch[0][:1]
    scores = None
    if config.importance == "taylor":
        scores = channel_scores(model, batches, lambda batch: loss(model, batch), taylor=True)
    elif config.importance == "activation":
        scores = channel_scores(model, batches, lambda batch: call(model, batch))
    exclude = [*config.exclude, last_layer(model, example)]
    return prune_channels(model, example, 1 - config.channels, exclude, scores=scores)
