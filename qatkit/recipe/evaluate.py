"""The ``evaluate`` block: what the report measures of language models besides their test loss."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity with a sliding window, and the distance of every row to the dense one, on the test split."""

    context: int | None = None
    """Tokens of a window; by default those of a sample of the data."""
    stride: int | None = None
    """Tokens between two windows; half the context by default. Smaller is slower, and nearer to unlimited context."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, which has to be installed (``qatkit[lm-eval]``): names, or YAML files."""
    limit: int | None = None
    """Samples of each task; all by default."""

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise ValueError(f"context: {self.context} leaves no token to predict; write 2 or more")
        if self.stride is not None and not 1 <= self.stride <= (self.context or self.stride):
            raise ValueError(f"stride: {self.stride} is out of range; write 1 up to the context")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} is out of range; write a number of at least 1, or leave it out")
