"""The logits in a model's output of any type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError


def logits_of(output: Any, keys: Sequence[str | int] | None) -> list[Tensor]:
    """The logits in a model's output.

    Args:
        output: A tensor, or a dict, tuple or object that holds tensors, such as a `ModelOutput`.
        keys: Keys or indices of the tensors; None for the output itself, or its "logits".

    Raises:
        QatkitError: a key does not name a tensor.
    """
    if keys is None:
        tensors = [output if isinstance(output, Tensor) else _entry(output, "logits")]
    else:
        tensors = [_entry(output, key) for key in keys]
    if all(isinstance(logits, Tensor) for logits in tensors):
        return tensors
    if isinstance(output, Mapping):
        kind = f"a {type(output).__name__} with {list(output)}"
    else:
        kind = f"{type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")
    missing = [key for key, logits in zip(keys or ["logits"], tensors, strict=True) if not isinstance(logits, Tensor)]
    raise QatkitError(
        f"the model returned {kind} without a tensor at {missing}",
        key="outputs",
        advice="pass outputs=[...] with the keys or indices of the tensors to compare",
    )


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return output[key] if isinstance(output, (tuple, list)) and -len(output) <= key < len(output) else None
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
