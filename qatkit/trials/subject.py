"""The subject of a search: what it needs to know about a model, whether a recipe or a LightningModule describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from qatkit.export.format_row import ExportFormat
from qatkit.schemes import Scheme
from qatkit.tasks.table import Task
from qatkit.trials.ladder import Rung
from qatkit.trials.variants import Variant


class Trained(Protocol):
    """A trained model and its exported file."""

    def model(self) -> nn.Module:
        """The model in eval mode."""

    def file(self) -> Path:
        """The exported file."""

    def failures(self) -> list[str]:
        """The differences that verification found between the file and the model; empty if it passed."""


class Subject(Protocol):
    """A model that can be trained in other formats."""

    format: ExportFormat
    """The format in which size and latency are measured."""

    @property
    def task(self) -> Task | None:
        """The task that the data declares."""

    def batches(self, split: Literal["validation", "test"]) -> Iterable[Any]:
        """The batches of a split.

        Raises:
            QatkitError: the data has none.
        """

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Check the variants, and train what all candidates need."""

    def plain(self, variant: Variant) -> nn.Module:
        """The model before training with quantization, in eval mode: pruned and shrunk, with plain layers."""

    def loss(self) -> Callable[[nn.Module], float]:
        """The loss of a model on training batches."""

    def select(self) -> dict[str, Sequence[str]]:
        """``include`` and ``exclude`` of `prepare_qat`."""

    def size(self, model: nn.Module, layers: Mapping[str, Scheme]) -> int:
        """The bytes of the exported file of a plain model in these formats, without training."""

    def train(self, variant: Variant, rung: Rung, share: float) -> Trained:
        """Train with a part of all steps; 0 calibrates only."""

    def dense(self) -> Trained:
        """The model to which losses are relative."""
