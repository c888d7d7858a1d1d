"""The ``evaluate`` block: language-model metrics in the report, in addition to the test loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from qatkit.common.ranges import INT32, Count, Range, check_ranges
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class EvaluateConfig:
    """Sliding-window perplexity, and the divergence of every stage from the dense one, on the held-out test set."""

    context: Annotated[int, Range(2, INT32)] | None = None
    """Tokens per window; by default the sample length of the data."""
    stride: Count | None = None
    """Tokens between the starts of two windows; half the context by default. A smaller stride is slower, and closer to
    the perplexity with unlimited context."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (install ``qatkit[lm-eval]``): names, or YAML files."""
    limit: Count | None = None
    """Samples per task; all by default."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.context is not None:
            self.check_stride(self.context)

    def check_stride(self, context: int) -> None:
        """Reject a stride that would skip tokens between two windows.

        Args:
            context: Tokens per window.

        Raises:
            QatkitError: the stride is larger.
        """
        if self.stride is not None and self.stride > context:
            raise QatkitError(
                f"{self.stride} is longer than a window of {context} tokens, so the tokens between two windows would "
                "not be predicted",
                key="stride",
                advice=f"use an integer from 1 to {context}",
            )
