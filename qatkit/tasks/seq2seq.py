"""Sequence to sequence: each output token is predicted from the input sequence and the preceding output tokens.

The batch contains ``decoder_input_ids``, which are the labels shifted right by one, as produced by transformers models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[tokens, vocabulary]`` and labels ``[tokens]``, which are `IGNORED` at padding."""
    labels = labels_in(batch)
    if "decoder_input_ids" not in batch:
        raise QatkitError(
            f"a batch has the keys {sorted(batch)}, but no 'decoder_input_ids'",
            key="data",
            advice="add the labels shifted right, for example with model.prepare_decoder_input_ids_from_labels",
        )
    check_shapes(logits, labels, dims=2)
    return logits.flatten(0, 1), labels.flatten()
