"""Find non-finite values in batches, and report the batch and the tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qatkit.errors import QatkitWarning


def non_finite_parts(batch: Any) -> dict[str, Tensor]:
    """Return whether each float tensor of a batch contains non-finite values, as 0-d tensors on its device.

    Args:
        batch: A pair, whose elements are named "inputs" and "labels", a longer sequence, or a mapping. A mask may
            contain Inf.

    Example:
        >>> non_finite_parts((torch.tensor([1.0, torch.nan]), torch.tensor([0, 1])))
        {'inputs': tensor(True)}
    """
    if isinstance(batch, Mapping):
        parts = {str(name): part for name, part in batch.items()}
    elif isinstance(batch, list | tuple):
        pair = ("inputs", "labels")
        parts = {pair[index] if len(batch) == 2 else str(index): part for index, part in enumerate(batch)}
    else:
        parts = {"inputs": batch}
    return {
        name: part.isnan().any() if "mask" in name else ~part.isfinite().all()
        for name, part in parts.items()
        if isinstance(part, Tensor) and part.is_floating_point()
    }


class InputCheck:
    """Finds the batches of a split that contain non-finite values; it synchronizes with the device only to report.

    Example:
        >>> check = InputCheck()
        >>> check.add((torch.tensor([1.0]), torch.tensor([0])))
        >>> check.add((torch.tensor([torch.inf]), torch.tensor([0])))
        >>> check.found("test")
        "'inputs' of test batch 2 of 2 contains non-finite values"
    """

    def __init__(self) -> None:
        self._flags: list[dict[str, Tensor]] = []

    def add(self, batch: Any) -> None:
        """Check one batch; see `non_finite_parts`."""
        self._flags.append(non_finite_parts(batch))

    def found(self, split: str = "") -> str | None:
        """Describe the first non-finite batch and count the others; None if all values are finite.

        Args:
            split: The split that contains the batches.
        """
        places = [(number, name) for number, flags in enumerate(self._flags, 1) for name in flags]
        if not places:
            return None
        marks = torch.stack([flag for flags in self._flags for flag in flags.values()]).tolist()
        bad = [place for place, marked in zip(places, marks, strict=True) if marked]
        if not bad:
            return None
        number, name = bad[0]
        others = len({batch for batch, _ in bad}) - 1
        more = f" (and of {others} more)" if others else ""
        batch = f"{split} batch" if split else "batch"
        return f"'{name}' of {batch} {number} of {len(self._flags)}{more} contains non-finite values"

    def warn(self, split: str) -> None:
        """Warn if a batch of an evaluated split contains non-finite values."""
        if (found := self.found(split)) is not None:
            warnings.warn(
                f"data: {found}; the metrics include the predictions for this data; remove the non-finite samples "
                "from the data",
                QatkitWarning,
                stacklevel=1,  # a caller in Lightning would be silenced together with Lightning's own warnings
            )
