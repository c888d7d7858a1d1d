"""The classes of layers that a format can convert."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from qatkit.errors import QatkitError


def check_classes(model: nn.Module, known: Set[type[nn.Module]], runtime: str, advice: str) -> None:
    """Raise an error if a layer of torch.nn is of a class that a format cannot convert; containers are not layers.

    Args:
        model: The model.
        known: The classes that can be converted.
        runtime: The runtime, as in "LiteRT export does not support".
        advice: What to do instead.

    Raises:
        QatkitError: there is such a layer.

    Example:
        >>> check_classes(nn.Sequential(nn.Linear(2, 2)), {nn.Linear}, "LiteRT", "use export: {format: onnx}")
    """
    for name, module in model.named_modules():
        kind = type(module)
        of_torch = kind.__module__.startswith("torch.nn.") and kind.__module__ != nn.Sequential.__module__
        if of_torch and next(module.children(), None) is None and kind not in known:
            raise QatkitError(f"layer '{name}': {runtime} export does not support {kind.__name__}", advice=advice)
