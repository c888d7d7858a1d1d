"""Find the logits in a model output of any type, with the classes in the last dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qatkit.callbacks.positions import check_class_dimension
from torch import Tensor

from qatkit.errors import QatkitError, did_you_mean
from qatkit.tasks.pairs import POOLINGS, pooled


@dataclass(frozen=True)
class ComparedOutputs:
    """The outputs of student and teacher that distillation compares."""

    keys: tuple[str | int, ...] | None
    """Keys or indices of the outputs; None compares the output itself, or its "logits"."""
    weights: tuple[float, ...]
    """Weight of each output's loss."""
    class_dim: int | None
    """The class dimension. None selects the last one, which is checked against the shape of the labels."""
    pooling: str | None = None
    """How hidden states are pooled into embeddings. None uses the ``pooling`` of the batch, if it has one."""

    @classmethod
    def of(
        cls,
        outputs: Sequence[str | int] | Mapping[str | int, float] | None,
        class_dim: int | None,
        pooling: str | None,
    ) -> ComparedOutputs:
        """Create from the arguments of `KnowledgeDistillation`.

        Args:
            outputs: Keys or indices of outputs whose losses are averaged, or a mapping from these to weights.
            class_dim: The class dimension.
            pooling: How hidden states are pooled.

        Raises:
            QatkitError: `outputs` is a string or empty, a weight is negative or non-finite, or the pooling is unknown.
        """
        if pooling is not None and pooling not in POOLINGS:
            raise QatkitError(f"unknown pooling '{pooling}'", key="pooling", advice=did_you_mean(pooling, POOLINGS))
        if isinstance(outputs, str):
            raise QatkitError(f"'{outputs}' is not a list", key="outputs", advice=f"use ['{outputs}']")
        if outputs is None:
            return cls(None, (1.0,), class_dim, pooling)
        if not outputs:
            raise QatkitError("the list is empty", key="outputs", advice="list at least one output, or remove outputs")
        if not isinstance(outputs, Mapping):
            return cls(tuple(outputs), (1 / len(outputs),) * len(outputs), class_dim, pooling)
        for key, weight in outputs.items():
            if not 0 <= weight < math.inf:
                raise QatkitError(
                    f"the weight of {key!r} is {weight}", key="outputs", advice="use a finite non-negative number"
                )
        return cls(tuple(outputs), tuple(outputs.values()), class_dim, pooling)

    def select(self, output: Any, batch: Any, present: Tensor | None) -> list[Tensor]:
        """Return the compared tensors of a model's output: ``[..., classes]``, or embeddings ``[rows, width]``.

        Args:
            output: The output.
            batch: The batch; its ``pooling`` is used if none is set.
            present: The attention mask, for pooling.

        Raises:
            QatkitError: a key does not refer to a tensor, a tensor has no dimension `class_dim`, or there is no mask.
        """
        pooling = self.pooling or (batch.get("pooling") if isinstance(batch, Mapping) else None)
        if pooling is None:
            return [self._classes_last(logits) for logits in logits_of(output, self.keys)]
        if present is None:
            raise QatkitError(
                "the model is called without an attention mask, so its outputs cannot be pooled",
                key="pooling",
                advice="pass attention_mask to the model, or remove pooling and let the model return embeddings",
            )
        keys = self.keys or (None if isinstance(output, Tensor) else ("last_hidden_state",))
        return [pooled(hidden, present.to(hidden.device), pooling) for hidden in logits_of(output, keys)]

    def fit_labels(self, labels: Tensor | None, logits: Tensor, compares_classes: bool) -> Tensor | None:
        """Remove a class dimension of size 1 from the labels: ``[N, 1, H, W]`` becomes ``[N, H, W]``.

        Args:
            labels: The labels of the batch, if there are any.
            logits: The student's logits in the layout returned by `select`.
            compares_classes: Whether the loss compares class probabilities.

        Raises:
            QatkitError: `class_dim` is not set, and the labels show that the classes are not in the last dimension.
        """
        if self.class_dim is None:
            check_class_dimension(logits, labels, compares_classes)
            return labels
        if labels is None or labels.dim() != logits.dim() or labels.shape[self.class_dim] != 1:
            return labels
        return labels.squeeze(self.class_dim)

    def _classes_last(self, logits: Tensor) -> Tensor:
        if self.class_dim is None:
            return logits
        if not -logits.dim() <= self.class_dim < logits.dim():
            raise QatkitError(
                f"the logits of shape {list(logits.shape)} have no dimension {self.class_dim}",
                key="class_dim",
                advice="pass the index of the class dimension",
            )
        return logits.movedim(self.class_dim, -1)


def logits_of(output: Any, keys: Sequence[str | int] | None) -> list[Tensor]:
    """Return the logits in a model's output.

    Args:
        output: A tensor, or a dict, tuple or object with tensors, such as a `ModelOutput`.
        keys: Keys or indices of the tensors, or paths such as "heads.0". None selects the output itself, or its
            "logits".

    Raises:
        QatkitError: a key does not refer to a tensor.
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
        f"the model returned {kind}, which contains no tensor at {missing}",
        key="outputs",
        advice="pass outputs=[...] with the keys or indices of the tensors to compare",
    )


def _entry(output: Any, key: str | int) -> Any:
    if isinstance(key, int):
        return output[key] if isinstance(output, (tuple, list)) and -len(output) <= key < len(output) else None
    found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
    if found is not None or "." not in key:
        return found
    first, _, rest = key.partition(".")
    return _entry(_entry(output, int(first) if first.isdigit() else first), int(rest) if rest.isdigit() else rest)
