"""Parts of `serve.py`: what is measured of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

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
    truth: Tensor
    """What outputs are scored against: labels ``[samples]``, or embeddings ``[samples, width]``."""


def scores(outputs: Tensor, truth: Tensor) -> np.ndarray[Any, Any]:
    """The metric of each test sample, ``[samples]``: whether the class is right, or the cosine to the embedding."""
    if truth.is_floating_point():
        return F.cosine_similarity(outputs.double(), truth.double(), dim=-1).numpy()
    return (outputs.argmax(1) == truth).double().numpy()


def samples(example: Example) -> int:
    """The number of samples of a batch."""
    return len(example if isinstance(example, Tensor) else next(iter(example.values())))


def taken(example: Example, index: Tensor) -> Example:
    """Some rows of a batch."""
    return example[index] if isinstance(example, Tensor) else {name: each[index] for name, each in example.items()}


def parts(example: Example, size: int = 64) -> Iterator[Example]:
    """A batch in parts of a size."""
    for indices in torch.arange(samples(example)).split(size):
        yield taken(example, indices)


def call(model: nn.Module, example: Example) -> Tensor:
    """The output of a model."""
    found: Tensor = model(example) if isinstance(example, Tensor) else model(**example)
    return found
