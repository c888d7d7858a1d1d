"""Build students from a subset of a teacher's layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, TypeVar

from torch import nn

from qatkit.common.layer_configs import DEPTHS, shorten
from qatkit.distillation.features import layer_map
from qatkit.errors import QatkitError

Model = TypeVar("Model", bound=nn.Module)


def student_from_teacher(
    teacher: Model, layers: int | Sequence[int], keep: Literal["uniform", "last"] = "uniform"
) -> Model:
    """Copy a transformers model with fewer layers and a matching config that `from_pretrained` can load.

    Everything except the dropped layers is copied. Sanh et al. (2019, https://arxiv.org/abs/1910.01108, section 3)
    initialize a student from every second layer of its teacher.

    Args:
        teacher: A transformers model with one stack of layers; it is not changed.
        layers: Number of layers to keep, or their indices in ascending order.
        keep: Which layers to keep if `layers` is a number: "uniform" spaces them evenly up to the last layer, and
            "last" keeps the last layers.

    Raises:
        QatkitError: the model has no config or has multiple stacks of layers, or `layers` refers to layers that do not
            exist.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2,
        ...     intermediate_size=8, num_hidden_layers=4))
        >>> student_from_teacher(teacher, 2).config.num_hidden_layers
        2
    """
    name, depth = _stack(teacher)
    if isinstance(layers, int):
        numbers = layer_map(layers, depth, keep)
    else:
        numbers = list(layers)
        if numbers != sorted({*numbers} & {*range(depth)}) or not numbers:
            raise QatkitError(
                f"{numbers} is not an ascending list of teacher layer indices",
                key="layers",
                advice=f"use indices from 0 to {depth - 1}",
            )
    dropped = [number for number in range(depth) if number not in numbers]
    stack = teacher.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    # dropped layers are not copied, because a teacher may fill the memory by itself
    student = copy.deepcopy(teacher, {id(stack[number]): None for number in dropped})
    kept = nn.ModuleList([student.get_submodule(f"{name}.{number}") for number in numbers])
    for index, layer in enumerate(kept):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):  # index of its keys and values in the cache
                part.layer_idx = index  # type: ignore[assignment]  # an int, as checked above
    student.set_submodule(name, kept)
    configs = {id(config): config for config in (getattr(part, "config", None) for part in student.modules())}
    for config in configs.values():
        if config is not None:
            shorten(config, depth, numbers)
    return student


def depth_of(teacher: nn.Module) -> int:
    """Return the number of layers of a transformers model.

    Raises:
        QatkitError: the model has no config, or has multiple stacks of layers.
    """
    return _stack(teacher)[1]


def _stack(teacher: nn.Module) -> tuple[str, int]:
    """Name and length of the only layer list whose length the config gives."""
    config = getattr(teacher, "config", None)
    depth = next((getattr(config, key) for key in DEPTHS if isinstance(getattr(config, key, None), int)), None)
    if depth is None:
        raise QatkitError(
            f"{type(teacher).__name__} has no config with {' or '.join(DEPTHS[:3])}",
            key="teacher",
            advice="pass a transformers model, or build the student yourself",
        )
    stacks = [
        name
        for name, part in teacher.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth and len({type(layer) for layer in part}) == 1
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        raise QatkitError(
            f"{type(teacher).__name__} has {len(stacks)} lists of {depth} layers ({stacks}), but only a model with "
            "one stack of layers is supported",
            key="teacher",
            advice="build the student yourself",
        )
    return stacks[0], depth
