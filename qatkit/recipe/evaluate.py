"""The ``evaluate`` block: language-model metrics in the report, in addition to the test loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from qatkit.common.ranges import INT32, Count, Range, check_ranges
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class EvaluateConfig:
    """Sliding-window perplexity, and the divergence of every stage from the dense model, on the held-out test set."""

    context: Annotated[int, Range(2, INT32)] | None = None
    """Tokens per window. The default is the sample length of the data."""
    stride: Count | None = None
    """Tokens between the starts of consecutive windows. The default is half the context. A smaller stride is slower and
    approximates the perplexity with unlimited context more closely.
    """
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (install ``qatkit[lm-eval]``): names, or YAML files."""
    limit: Count | None = None
    """Maximum number of samples per task. By default, all samples are used."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.context is not None:
            self.check_stride(self.context)

    def check_stride(self, context: int) -> None:
        """Raise an error if the stride would skip tokens between windows.

        Args:
            context: Tokens per window.

        Raises:
            QatkitError: the stride is larger than the context.
        """
        if self.stride is not None and self.stride > context:
            raise QatkitError(
                f"{self.stride} exceeds the window of {context} tokens, so the tokens between two windows would "
                "not be predicted",
                key="stride",
                advice=f"use an integer from 1 to {context}",
            )
