"""The ``shrink`` block of a variant."""

from __future__ import annotations

from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.pruning.axes import prefix_of
from qatkit.trials.variants import Variant


def shrink_sizes(variant: Variant, model: nn.Module) -> dict[str, Any]:
    """Return the sizes of a ``shrink`` block; empty if the variant keeps depth and width.

    Layers of Llama-like transformers are chosen by their measured importance, those of others evenly spaced.

    Args:
        variant: The variant.
        model: The model, which may be on the meta device.
    """
    sizes: dict[str, Any] = {}
    if variant.depth is not None:
        sizes["layers"] = variant.depth
        try:
            prefix_of(model)
        except QatkitError:
            sizes["layers_by"] = "uniform"
    if variant.width is not None:
        sizes["neurons" if hasattr(model, "config") else "channels"] = variant.width
    return sizes
