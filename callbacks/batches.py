"""The first training batches, looked at without changing what training will see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from qatkit.errors import QatkitError


def first_batches(loader: Any, count: int) -> Iterator[Any]:
    """The first `count` batches of a loader, without moving the generators that decide the order of training.

    Raises:
        QatkitError: the module trains on several loaders at once, so that there is no one kind of batch.
    """
    if isinstance(loader, (list, tuple, dict)):
        raise QatkitError(
            f"calibration: training reads a {type(loader).__name__} of {len(loader)} loaders, and which of their "
            "batches the module takes is unknown; call prepare_qat and qatkit.calibrate(module, batches, forward) "
            "yourself, or use dynamic activations (strategy='token')"
        )
    sources = [getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None)]
    generators = [source for source in sources if isinstance(source, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield from islice(loader, count)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
