"""The ``evaluate`` block: language-model metrics in the report, in addition to the test loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from qatkit.errors import QatkitError


@dataclass(frozen=True)
class EvaluateConfig:
    """Sliding-window perplexity, and the divergence of every stage from the dense one, on the held-out test set."""

    context: int | None = None
    """Tokens per window; by default the sample length of the data."""
    stride: int | None = None
    """Tokens between the starts of two windows; half the context by default. A smaller stride is slower, and closer to
    the perplexity with unlimited context."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (install ``qatkit[lm-eval]``): names, or YAML files."""
    limit: int | None = None
    """Samples per task; all by default."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise QatkitError(
                f"{self.context} leaves no token to predict", key="context", advice="use an integer of at least 2"
            )
        if self.stride is not None and not 1 <= self.stride <= (self.context or self.stride):
            raise QatkitError(
                f"{self.stride} is out of range", key="stride", advice="use an integer from 1 to the context"
            )
        if self.limit is not None and self.limit < 1:
            raise QatkitError(
                f"{self.limit} is out of range", key="limit", advice="use an integer of at least 1, or remove the key"
            )
