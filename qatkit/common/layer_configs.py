"""Per-layer settings in transformers configs, for models from which layers are removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
"""Config keys for the number of layers."""
PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "attention_window", "layer_rope_theta",
)  # fmt: skip
"""Lists with one entry per layer."""
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "rope_scaling_layers")
"""Lists of layer indices."""


def shorten(config: Any, depth: int, numbers: Sequence[int]) -> None:
    """Adapt a config in place to a model with some of its layers removed.

    A config whose number of layers is not `depth` is left unchanged.

    Args:
        config: The config of a transformers model.
        depth: Number of layers before the removal.
        numbers: Indices of the kept layers, in ascending order.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], mlp_only_layers=[0, 3])
        >>> shorten(config, 4, [1, 3])
        >>> config
        namespace(num_hidden_layers=2, no_rope_layers=[1, 0], mlp_only_layers=[1])
    """
    counts = next((key for key in DEPTHS if getattr(config, key, None) == depth), None)
    if counts is None:
        return
    setattr(config, counts, len(numbers))
    for key in PER_LAYER:
        values = getattr(config, key, None)
        if (
            isinstance(values, (list, tuple)) and len(values) >= depth
        ):  # SmolLM3's may be longer than its number of layers
            setattr(config, key, [values[number] for number in numbers])
    for key in INDEX_LISTS:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)):
            setattr(config, key, [new for new, number in enumerate(numbers) if number in values])
