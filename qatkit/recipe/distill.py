"""The ``distill`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatkit.recipe.common import MISSING


@dataclass(frozen=True)
class CacheConfig:
    """Ask the teacher once, before training, and keep its best classes of every token; then no teacher is needed."""

    top_k: int = 64
    """Classes kept of every token, at least 1 and fewer than there are; all others together are one more."""
    folder: str | None = None
    """Where they are kept, to be shared by runs; by default in the run's folder."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} is out of range; write a whole number of at least 1, such as 64")


@dataclass(frozen=True)
class HiddenConfig:
    """Hidden states of the student that are to be those of the teacher."""

    layers: dict[str, str] = MISSING
    """The teacher's layer for each layer of the student, by their names in the two models or by globs."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """Where a glob matches more layers of the teacher: spread over them with the last one, or the last ones."""
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss; above 0."""
    loss: Literal["mse", "cosine"] = "mse"
    widths: list[int] | None = None
    """Widths of student and teacher where they differ: a linear map for each pair is then learned."""

    def __post_init__(self) -> None:
        _check_features(self.layers, self.weight)
        if self.widths is not None and (len(self.widths) != 2 or min(self.widths) < 1):
            raise ValueError(f"widths: {self.widths} are not two widths; write [of the student, of the teacher]")


@dataclass(frozen=True)
class AttentionConfig:
    """What the student attends to, which is to be what the teacher attends to."""

    layers: dict[str, str] = MISSING
    """As in ``hidden``: convolutions, or the layers that make queries, keys or values."""
    layers_by: Literal["uniform", "last"] = "uniform"
    """As in ``hidden``."""
    weight: float = 1.0
    """Weight of the mean over the layers, added to the loss; above 0."""
    heads: int | None = None
    """Relation heads of queries, keys or values; null transfers the attention of feature maps."""

    def __post_init__(self) -> None:
        _check_features(self.layers, self.weight)
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads: {self.heads} is out of range; write a whole number of at least 1, or null")


@dataclass(frozen=True)
class GenerationConfig:
    """Train some batches on texts that a model writes: beginnings of the data's texts, continued while training."""

    fraction: float = 1.0
    """Share of the batches, 0 to 1."""
    ramp: float = 0.0
    """Share of the stage over which `fraction` rises from 0, 0 to 1."""
    prompt: int | None = None
    """Tokens that are kept of a text; by default those before the first that has a label."""
    new_tokens: int = 32
    """Tokens that are written at most; a text ends earlier with an end-of-text token."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; 0 takes the most probable one."""

    def __post_init__(self) -> None:
        for name in ("fraction", "ramp"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: {value} is out of range; write a number from 0 to 1")
        for name in ("prompt", "new_tokens"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}: {number} is out of range; write a whole number of at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is out of range; write 0 or a number above 0")

    def share(self, progress: float) -> float:
        """Share of the batches at a point of the stage, 0 to 1."""
        return self.fraction * (min(1.0, progress / self.ramp) if self.ramp else 1.0)


@dataclass(frozen=True)
class DistillConfig:
    """Learn from a teacher's outputs: ``alpha * T**2 * KL(teacher || student) + (1 - alpha) * loss``."""

    temperature: float = 1.0
    """Divides both sets of logits; above 0."""
    alpha: float = 0.5
    """Weight of the distillation term, 0 to 1; the labels' loss gets the rest."""
    loss: Literal["kl", "reverse_kl", "jsd", "mse"] = "kl"
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon, or the squared error of the outputs."""
    beta: float = 0.5
    """With ``loss: jsd``, the teacher's share in the mixture, between 0 and 1."""
    ramp: float = 0.0
    """Share of the stage over which the distillation term rises to its weight, 0 to 1."""
    teacher: str | None = None
    """The stage whose result teaches; by default the model before the first compression on this stage's way."""
    teacher_bits: int | None = None
    """8 or 4: bitsandbytes holds the weights of the teacher's linear layers, all but the output layer."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the teacher's weights; null leaves them as they are."""
    teacher_device: str | None = None
    """Where the teacher stays, such as ``cuda:1``; null is where the student is."""
    cache: CacheConfig | None = None
    """Learn from what the teacher said before training; needs ``loss: kl``."""
    hidden: HiddenConfig | None = None
    """Compare hidden states as well."""
    attention: AttentionConfig | None = None
    """Compare attention as well."""
    on_policy: GenerationConfig | None = None
    """Language models: the student writes, and learns from the teacher alone how to go on."""
    sequence_level: GenerationConfig | None = None
    """Language models: the teacher writes, and its texts are trained on as data are."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} is out of range; write a number above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: {self.alpha} is out of range; write a number from 0 to 1")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta: {self.beta} is out of range; write a number between 0 and 1")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp: {self.ramp} is out of range; write a number from 0 to 1")
        if self.teacher_bits not in (None, 8, 4):
            raise ValueError(f"teacher_bits: {self.teacher_bits} is not offered by bitsandbytes; write 8, 4 or null")
        if self.cache is not None and self.loss != "kl":
            raise ValueError(
                f"loss: '{self.loss}' needs all of the teacher's outputs, and a cache holds its best classes; write "
                "kl, or leave cache out"
            )
        if self.cache is not None and self.attention is not None and self.attention.heads is None:
            raise ValueError(
                "attention: a cache keeps vectors of tokens and no feature maps; write heads, or leave cache out"
            )
        if self.on_policy is not None and self.sequence_level is not None:
            fractions = self.on_policy.fraction, self.sequence_level.fraction
            if sum(fractions) > 1:
                raise ValueError(
                    f"on_policy.fraction: {fractions[0]} and sequence_level.fraction: {fractions[1]} are more than all "
                    "batches; write two numbers whose sum is at most 1"
                )
        for name in ("on_policy", "sequence_level"):
            if self.cache is not None and getattr(self, name) is not None:
                raise ValueError(f"{name}: a cache knows only the data's texts; leave cache out, or {name}")


def _check_features(layers: dict[str, str], weight: float) -> None:
    if not weight > 0:
        raise ValueError(f"weight: {weight} is out of range; write a number above 0")
    if not layers:
        raise ValueError("layers: {} names no layers; write {layer of the student: layer of the teacher}")
