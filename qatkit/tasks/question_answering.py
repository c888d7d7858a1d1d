"""Extractive question answering: predict the first and last token of the answer in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qatkit.errors import QatkitError


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the start and end logits over the tokens, ``[2 * batch, tokens]``, and the labeled positions.

    Args:
        logits: Start and end logits, ``[batch, 2, tokens]``; see `to_logits`.
        batch: ``start_positions`` and ``end_positions``, ``[batch]``.
    """
    missing = [key for key in ("start_positions", "end_positions") if key not in batch]
    if missing:
        raise QatkitError(
            f"a batch has the keys {sorted(batch)}, but no {' and no '.join(map(repr, missing))}",
            key="data",
            advice="add the positions of each answer's first and last token",
        )
    positions = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
    return logits.flatten(0, 1), positions.flatten()
