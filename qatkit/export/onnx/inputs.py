"""The named inputs of an ONNX file: tensors for one call of the model, and the dynamic dimensions."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.export.output_tensors import kinds
from qatkit.tasks.table import TASKS, Task

Axes = dict[str, dict[int, str]]
"""Names of the dynamic dimensions of every input, such as ``{"input_ids": {0: "batch", 1: "sequence"}}``."""


@dataclass(frozen=True)
class Inputs:
    """The keyword arguments of one call, and the names of the dynamic dimensions."""

    tensors: dict[str, Tensor]
    """Tensors on the CPU, in the order of the parameters of `forward`, with at least two samples."""
    axes: Axes

    @property
    def batch_only(self) -> Axes:
        """Return the axes if only the batch dimension is dynamic."""
        return {name: {0: axes[0]} if 0 in axes else {} for name, axes in self.axes.items()}


def inputs_of(model: nn.Module, example: Any, task: Task | None) -> Inputs:
    """Name the tensors of an example after the parameters of the model's `forward`.

    The batch size is the most frequent size of the first dimension of all inputs, and a warning lists inputs with a
    different first dimension. The task adds other dynamic dimensions. If the size of such a dimension differs between
    inputs, later text inputs have their own dynamic dimension, and the dimension of any other input is fixed.

    Args:
        model: The model.
        example: A tensor; a tuple of positional arguments; or a mapping of keyword arguments. None values are passed to
            the model and are not inputs of the file.
        task: The task, whose `Task.free_dims` may vary; None treats integers ``[batch, tokens]`` in a mapping as text.

    Raises:
        QatkitError: the example has an unsupported type, contains values that are not tensors, or does not match the
            parameters of `forward`.
    """
    tensors = _by_name(model, example)
    batch = _batch_size(tensors)
    names = {0: "batch"}
    if task is not None:
        names |= task.free_dims
    elif isinstance(example, Mapping) and any(_is_text(tensor) for tensor in tensors.values()):
        names |= TASKS["text_classification"].free_dims
    axes: Axes = {}
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        in_batch = tensor.dim() > 0 and len(tensor) == batch
        prefix = "decoder_" if name.startswith("decoder_") else ""
        axes[name] = {}
        for axis, word in names.items() if in_batch else ():
            if axis < tensor.dim():
                free = word if axis == 0 else prefix + word
                if sizes.setdefault(free, tensor.shape[axis]) == tensor.shape[axis]:
                    axes[name][axis] = free
                elif _is_text(tensor):
                    axes[name][axis] = f"{name}_{word}"
        if in_batch and batch == 1:  # torch.export may treat a batch size of one as a constant
            tensors[name] = torch.cat([tensor, tensor])
    return Inputs(tensors, axes)


def _batch_size(tensors: dict[str, Tensor]) -> int:
    sizes = {name: len(tensor) for name, tensor in tensors.items() if tensor.dim()}
    if not sizes:
        raise QatkitError(
            f"{', '.join(tensors)} of the example has no dimensions, but the first dimension must be the batch",
            advice="pass tensors [batch, ...]",
        )
    batch = Counter(sizes.values()).most_common(1)[0][0]
    if others := [f"'{name}' ({size})" for name, size in sizes.items() if size != batch]:
        warnings.warn(
            f"the batch of the example is {batch}, so the first dimension of {', '.join(others)} has a fixed size in "
            "the exported file",
            QatkitWarning,
            stacklevel=5,
        )
    return batch


def _by_name(model: nn.Module, example: Any) -> dict[str, Tensor]:
    positional = (example,) if isinstance(example, Tensor) else example
    args, kwargs = ((), positional) if isinstance(positional, Mapping) else (positional, {})
    if not isinstance(args, tuple):
        raise QatkitError(
            f"'onnx' exports only models whose inputs are tensors, but this example is {kinds(example)}",
            advice="pass a tensor, a tuple of positional arguments, or a mapping of keyword arguments",
        )
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise QatkitError(
            f"the example does not fit the parameters of {type(model).__name__}.forward: {error}",
            advice="pass one tensor for each required parameter of forward",
        ) from None
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise QatkitError(
                f"{type(model).__name__}.forward takes '*{name}', but the inputs of an ONNX file need names",
                advice="replace it with named parameters",
            )
        else:
            given[name] = value
    tensors = {name: value.detach().cpu() for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in given.items():
        if value is not None and name not in tensors:
            raise QatkitError(
                f"input '{name}' is {kinds(value)}, but every input of an ONNX file must be a single tensor",
                advice="leave options at their defaults, and pass the tensors of a nested input one by one",
            )
    if not tensors:
        raise QatkitError("the example contains no tensor", advice="pass the inputs of one call of the model")
    return tensors


def unknown_inputs(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Describe the inputs of a file whose names match no parameter of the model's `forward`."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [
        f"input '{name}': {type(model).__name__}.forward has no parameter with this name"
        for name in names
        if name not in parameters
    ]


def _is_text(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()
