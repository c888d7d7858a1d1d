"""Students made of some of a teacher's layers."""

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
    """A copy of a transformers model with fewer layers, whose config says so: `from_pretrained` loads what it saves.

    Sanh et al. (2019, https://arxiv.org/abs/1910.01108), section 3, start a student from every second layer of its
    teacher. Everything but the dropped layers is copied.

    Args:
        teacher: A model of transformers with one stack of layers; it stays as it is.
        layers: How many layers to keep, or the numbers of those to keep, in rising order from 0.
        keep: Which, where `layers` is a number: spread over the teacher with its last layer, or its last ones.

    Raises:
        QatkitError: the model has no config or several stacks, or the numbers are not in it.

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
                f"layers: {numbers} are no layers of the teacher in rising order; write numbers from 0 to {depth - 1}"
            )
    dropped = [number for number in range(depth) if number not in numbers]
    stack = teacher.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    # not copied only to be dropped: a teacher may fill the memory by itself
    student = copy.deepcopy(teacher, {id(stack[number]): None for number in dropped})
    kept = nn.ModuleList([student.get_submodule(f"{name}.{number}") for number in numbers])
    for index, layer in enumerate(kept):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):  # where its keys and values lie in the cache
                part.layer_idx = index  # type: ignore[assignment]  # no tensor, as was just seen
    student.set_submodule(name, kept)
    configs = {id(config): config for config in (getattr(part, "config", None) for part in student.modules())}
    for config in configs.values():
        if config is not None:
            shorten(config, depth, numbers)
    return student


def depth_of(teacher: nn.Module) -> int:
    """How many layers a model of transformers has.

    Raises:
        QatkitError: the model has no config or several stacks.
    """
    return _stack(teacher)[1]


def _stack(teacher: nn.Module) -> tuple[str, int]:
    """Name and size of the one list of layers that the config counts."""
    config = getattr(teacher, "config", None)
    depth = next((getattr(config, key) for key in DEPTHS if isinstance(getattr(config, key, None), int)), None)
    if depth is None:
        raise QatkitError(
            f"teacher: {type(teacher).__name__} has no config with {' or '.join(DEPTHS[:3])}; pass a model of "
            "transformers, or build the student yourself"
        )
    stacks = [
        name
        for name, part in teacher.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth and len({type(layer) for layer in part}) == 1
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        raise QatkitError(
            f"teacher: {type(teacher).__name__} has {len(stacks)} lists of {depth} layers ({stacks}); only a model "
            "with one stack of layers can be cut, so build the student yourself"
        )
    return stacks[0], depth
