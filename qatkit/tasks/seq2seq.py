"""Sequence to sequence: each token of an output text from the input text and the output tokens before it.

The batch has ``decoder_input_ids``, the labels shifted right by one, as transformers models make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[tokens, vocabulary]`` and labels ``[tokens]``, or `IGNORED` at padding."""
    labels = labels_in(batch)
    if "decoder_input_ids" not in batch:
        raise QatkitError(
            f"a batch has the keys {sorted(batch)}, but no 'decoder_input_ids'",
            key="data",
            advice="add the labels shifted right, as model.prepare_decoder_input_ids_from_labels does",
        )
    check_shapes(logits, labels, dims=2)
    return logits.flatten(0, 1), labels.flatten()
