"""The logits in whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError


def logits_of(output: Any, keys: Sequence[str | int] | None) -> list[Tensor]:
    """The logits in what a model returned.

    Args:
        output: A tensor, or a dict, a tuple or an object that holds tensors, such as a `ModelOutput`.
        keys: Keys or positions of the tensors; None for the output itself, or its "logits".

    Raises:
        QatkitError: there are no tensors at these keys.
    """
    if keys is None:
        found = [output if isinstance(output, Tensor) else _entry(output, "logits")]
    else:
        found = [_entry(output, key) for key in keys]
    if all(isinstance(logits, Tensor) for logits in found):
        return found
    if isinstance(output, Mapping):
        has = f"a {type(output).__name__} with {list(output)}"
    else:
        has = f"{type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")
    missing = [key for key, logits in zip(keys or ["logits"], found, strict=True) if not isinstance(logits, Tensor)]
    raise QatkitError(
        f"distillation needs logits; the model returned {has} without any at {missing}; write outputs=[...] with the "
        "keys or positions of the tensors to compare"
    )


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return output[key] if isinstance(output, (tuple, list)) and -len(output) <= key < len(output) else None
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
