"""The ``distill`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qatkit.common.ranges import Count, Fraction, ProperFraction, Range, check_ranges
from qatkit.distillation.divergences import DIVERGENCES, HIDDEN_LOSSES
from qatkit.errors import QatkitError
from qatkit.recipe.common import MISSING

LossWeight = Annotated[float, Range(0.0, 1e6, above=True)]
"""Weight of a loss term."""


@dataclass(frozen=True)
class CacheConfig:
    """Run the teacher once before training and store its top-k outputs per token; training then needs no teacher."""

    top_k: Count = 64
    """Number of classes stored per token, at least 1 and less than the teacher's; all other classes are merged into
    one.
    """
    folder: str | None = None
    """Folder of the cache, to share it between runs (requires ``--allow-write``). The default is inside the run's
    folder.
    """

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class HiddenConfig:
    """Match the student's hidden states to the teacher's."""

    layers: dict[str, str] = MISSING
    """Maps student layers to teacher layers, by names or globs."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """How to pair layers if a glob matches more teacher layers than student layers: ``uniform`` spaces them evenly up
    to the teacher's last layer, and ``last`` uses the teacher's last layers.
    """
    weight: LossWeight = 1.0
    """Positive weight of the mean over the layers, added to the loss."""
    loss: str = "mse"
    """``mse`` or ``cosine``."""
    widths: list[int] | None = None
    """Student and teacher width, if they differ. Each pair of layers then learns a linear projection."""

    def __post_init__(self) -> None:
        HIDDEN_LOSSES.row(self.loss, key="loss")
        check_ranges(self)
        _check_layers(self.layers)
        if self.widths is not None and (len(self.widths) != 2 or min(self.widths) < 1):
            raise QatkitError(
                f"{self.widths} is not a pair of widths", key="widths", advice="use [student width, teacher width]"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Match the student's attention to the teacher's."""

    layers: dict[str, str] = MISSING
    """As in ``hidden``; the layers are convolutions, or the projections that compute queries, keys or values."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """As in ``hidden``."""
    weight: LossWeight = 1.0
    """Positive weight of the mean over the layers, added to the loss."""
    heads: Count | None = None
    """Number of relation heads for queries, keys or values; null transfers the attention of feature maps."""

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_layers(self.layers)


@dataclass(frozen=True)
class GenerationConfig:
    """Train on generated text in some batches: during training, a model continues prompts from the data."""

    fraction: Fraction = 1.0
    """Fraction of batches to generate, 0 to 1."""
    ramp: Fraction = 0.0
    """Fraction of the stage (0 to 1) over which `fraction` rises from 0."""
    prompt: Count | None = None
    """Prompt length in tokens. By default, the prompt consists of a sequence's tokens before its first label."""
    new_tokens: Count = 32
    """Maximum number of generated tokens; generation stops earlier at an end-of-text token."""
    temperature: Annotated[float, Range(0.0, 1e4)] = 1.0
    """Divides the logits before sampling; 0 always picks the most probable token."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fraction_at(self, progress: float) -> float:
        """Return the fraction of generated batches at a given point in the stage.

        Args:
            progress: Progress of the stage, 0 to 1.
        """
        return self.fraction * (min(1.0, progress / self.ramp) if self.ramp else 1.0)


@dataclass(frozen=True)
class DistillConfig:
    """Learn from a teacher's outputs: ``alpha * T**2 * KL(teacher || student) + (1 - alpha) * loss``."""

    temperature: Annotated[float, Range(0.0, 1e4, above=True)] = 1.0
    """Positive number that divides both sets of logits."""
    alpha: Fraction = 0.5
    """Weight of the distillation term, 0 to 1; the loss on the labels has weight ``1 - alpha``."""
    loss: str = "kl"
    """A name in `qatkit.distillation.divergences.DIVERGENCES`: ``kl``, ``reverse_kl``, ``jsd`` or ``mse``."""
    beta: ProperFraction = 0.5
    """Weight of the teacher in the mixture of ``loss: jsd``, between 0 and 1."""
    ramp: Fraction = 0.0
    """Fraction of the stage (0 to 1) over which the distillation term rises to its weight."""
    teacher: str | None = None
    """The stage whose result is the teacher. The default is the model before the first compression on this stage's
    path.
    """
    teacher_bits: int | None = None
    """8 or 4: quantize the teacher's linear layers, except its output layer, with bitsandbytes."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the teacher's weights; null leaves them unchanged."""
    teacher_device: str | None = None
    """The teacher's device, such as ``cuda:1``; null uses the student's device."""
    cache: CacheConfig | None = None
    """Learn from a cached teacher; requires a loss that can be computed from the top-k classes, such as ``kl``."""
    hidden: HiddenConfig | None = None
    """Add a loss between hidden states."""
    attention: AttentionConfig | None = None
    """Add a loss between attention maps or relations."""
    on_policy: GenerationConfig | None = None
    """Train a language model on text that the student generates, with the distillation term only."""
    sequence_level: GenerationConfig | None = None
    """Train a language model on text that the teacher generates, as if it were data."""

    def __post_init__(self) -> None:
        divergence = DIVERGENCES.row(self.loss, key="loss")
        check_ranges(self)
        if self.teacher_bits not in (None, 8, 4):
            raise QatkitError(
                f"bitsandbytes does not support {self.teacher_bits} bits",
                key="teacher_bits",
                advice="use 8, 4 or null",
            )
        if self.cache is not None:
            divergence.check_cached()
            if self.attention is not None and self.attention.heads is None:
                raise QatkitError(
                    "a cache stores one vector per token and no feature maps",
                    key="attention",
                    advice="set heads, or remove the cache",
                )
        if self.on_policy is not None and self.sequence_level is not None:
            fractions = self.on_policy.fraction, self.sequence_level.fraction
            if sum(fractions) > 1:
                raise QatkitError(
                    f"{fractions[0]} and sequence_level.fraction {fractions[1]} add up to more than 1",
                    key="on_policy.fraction",
                    advice="use two fractions that add up to at most 1",
                )
        for name in ("on_policy", "sequence_level"):
            if self.cache is not None and getattr(self, name) is not None:
                raise QatkitError(
                    "a cache contains no outputs for generated text", key=name, advice=f"remove the cache, or {name}"
                )


def _check_layers(layers: dict[str, str]) -> None:
    if not layers:
        raise QatkitError("no layers are listed", key="layers", advice="use {student layer: teacher layer}")
