"""Parts of `serve.py`: what is measured of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from qatkit.report.bench import Example


@dataclass(frozen=True)
class Network:
    """A trained network with its test data, and how qatkit trains it further."""

    dense: nn.Module
    """The network in floating point."""
    example: Example
    """The inputs of one call, for the export."""
    held_out: Example
    """The inputs of the test samples."""
    calibration: Sequence[Example]
    """The batches for `quantize_static`."""
    tune: Callable[[Callback], nn.Module]
    """Trains a copy with a `QuantizationAwareTraining` callback."""
    score: Callable[[Tensor], np.ndarray[Any, Any]]
    """The metric of each test sample, ``[samples]``, from the outputs of a file."""

    @property
    def samples(self) -> int:
        """The number of test samples."""
        return len(self.held_out if isinstance(self.held_out, Tensor) else next(iter(self.held_out.values())))


def taken(example: Example, index: Tensor) -> Example:
    """Some rows of a batch."""
    return example[index] if isinstance(example, Tensor) else {name: each[index] for name, each in example.items()}


def parts(example: Example, size: int = 64) -> Iterator[Example]:
    """A batch in parts of a size."""
    count = len(example if isinstance(example, Tensor) else next(iter(example.values())))
    for indices in torch.arange(count).split(size):
        yield taken(example, indices)


def call(model: nn.Module, example: Example) -> Tensor:
    """The output of a model."""
    found: Tensor = model(example) if isinstance(example, Tensor) else model(**example)
    return found
