"""Find the tensors in model outputs of any type, and measure the differences between the outputs of two models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError


def tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors in a model's outputs by their path in nested dicts, lists, tuples and dataclasses.

    Example:
        >>> list(tensors([{"boxes": torch.zeros(1)}, torch.ones(2)]))
        ['0.boxes', '1']
    """
    if isinstance(outputs, Tensor):
        return {"": outputs}
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(outputs, Mapping):
        entries = outputs.items()
    elif isinstance(outputs, list | tuple):
        entries = enumerate(outputs)
    elif is_dataclass(outputs):
        entries = vars(outputs).items()
    return {f"{key}.{name}".rstrip("."): tensor for key, part in entries for name, tensor in tensors(part).items()}


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Call a model on an example without gradients, and return the result of `tensors`.

    Raises:
        QatkitError: the model fails on the example, or does not return a tensor.

    Example:
        >>> list(outputs_of(torch.nn.Linear(2, 1), {"input": torch.zeros(3, 2)}))
        ['']
    """
    try:
        with torch.no_grad():
            outputs = model(**inputs)
    except QatkitError:
        raise
    except Exception as error:  # a forward may raise anything
        raise QatkitError(
            f"the model fails on the example: {type(error).__name__}: {error}",
            advice="pass the inputs of one call; if `forward` computes with the weight of a quantized layer itself, "
            "exclude that layer",
        ) from error
    if not (found := tensors(outputs)):
        raise QatkitError(
            f"the model returned {kinds(outputs)}, which contains no tensor",
            advice="return a tensor, or tensors in dicts, lists, tuples or dataclasses",
        )
    return found


def nested(flat: Mapping[str, Any]) -> Any:
    """Rebuild outputs from the result of `tensors`; lists and dataclasses become tuples and dicts.

    Example:
        >>> nested({"0.boxes": 1, "1": 2}), nested({"": 3})
        (({'boxes': 1}, 2), 3)
    """
    if set(flat) == {""}:
        return flat[""]
    parts: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = value
    built = {first: nested(part) for first, part in parts.items()}
    return tuple(built.values()) if list(built) == [str(index) for index in range(len(built))] else built


def kinds(value: Any) -> str:
    """Describe a value by its tensors.

    Example:
        >>> kinds((torch.zeros(2, 3), {"boxes": torch.zeros(4)}))
        "tuple with '0' [2, 3], '1.boxes' [4]"
    """
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {list(value.shape)}"
    parts = [f"'{name}' {list(tensor.shape)}" for name, tensor in tensors(value).items()]
    return f"{kind} with {', '.join(parts)}" if parts else kind


def distances(expected: Any, computed: Any) -> dict[str, tuple[float, float]]:
    """Return the sum and maximum of the absolute differences of each output, by name.

    Raises:
        ValueError: an output is missing or has a different shape.
    """
    ours, theirs = tensors(expected), tensors(computed)
    if ours.keys() != theirs.keys():
        raise ValueError(f"outputs {sorted(theirs)} instead of {sorted(ours)}")
    for name, output in ours.items():
        if theirs[name].shape != output.shape:
            place = f"output '{name}' has " if name else ""
            raise ValueError(f"{place}shape {list(theirs[name].shape)} instead of {list(output.shape)}")
    return {name: difference(output, theirs[name]) for name, output in ours.items()}


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the sum and maximum of the absolute differences of two tensors; unequal integers differ by 1.

    Equal infinities do not differ: a mask may set logits to -Inf.
    """
    gaps = (theirs != ours).float()
    if is_number(ours):
        gaps = torch.where(gaps > 0, (theirs - ours).abs(), gaps)
    return float(gaps.sum(dtype=torch.float64)), float(gaps.max()) if gaps.numel() else 0.0


def is_number(tensor: Tensor) -> bool:
    """Whether the values are numbers that rounding may change, not integers or booleans."""
    return tensor.is_floating_point() or tensor.is_complex()


def finite(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The values that are finite in both tensors."""
    both = ours.isfinite() & theirs.isfinite()
    return ours[both], theirs[both]
