"""A stage: one stretch of training and the blocks that say what happens in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatkit.recipe.common import MISSING, FactoryConfig
from qatkit.recipe.distill import DistillConfig
from qatkit.recipe.lora import LoraConfig
from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig
from qatkit.recipe.prune import PruneConfig
from qatkit.recipe.quantize import QuantizeConfig
from qatkit.recipe.shrink import ShrinkConfig
from qatkit.recipe.watching import EarlyStoppingConfig, SamplesConfig

ScheduleName = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training. A block that is present is on; ``max_steps: 0`` only prepares and measures."""

    max_steps: int = MISSING
    batch_size: int = 64
    """Samples per device and step."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """torch's AdamW, or one of bitsandbytes: moments in 8 bits, or in memory that a GPU shares with the machine."""
    schedule: ScheduleName = "cosine"
    warmup: float = 0.0
    """Share of the stage over which the learning rate rises from zero, 0 to 1."""
    decay: float = 0.2
    """With schedule wsd (warm-up, stable, decay): share of the stage, at its end, over which the rate falls to zero."""
    gradient_clip: float | None = None
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Batches per optimizer step."""
    early_stopping: EarlyStoppingConfig | None = None
    samples: SamplesConfig | None = None
    start: str | None = None
    """The earlier stage whose model this one goes on with; by default the one before."""
    model: FactoryConfig | None = None
    """Begin with this model instead of the one that the stage before left, such as a small student."""
    shrink: ShrinkConfig | None = None
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    hold_sparsity: bool = True
    """Keep the zeros that an earlier stage made."""
    quantize: QuantizeConfig | None = None
    lora: LoraConfig | None = None
    lottery: LotteryConfig | None = None
    """Stands for stages of its own; a `Recipe` holds these instead."""
    rewind: RewindConfig | None = None
    part: PartConfig | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_steps", 0), ("batch_size", 1), ("accumulate", 1)):
            if (value := getattr(self, name)) != MISSING and value < low:
                raise ValueError(f"{name}: {value} is out of range; write a whole number of at least {low}")
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr} is out of range; write a number above 0, such as 1e-3")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: {self.weight_decay} is out of range; write 0 or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: {self.warmup} is out of range; write a share from 0 to 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: {self.decay} is out of range; write a share above 0 and up to 1")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"decay: {self.decay} and a warmup of {self.warmup} are more than the stage; write two shares with a "
                "sum of at most 1"
            )
        if self.start is not None and self.model is not None:
            raise ValueError(f"start: '{self.start}' and a model are given; write the one that the stage begins with")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip: {self.gradient_clip} is out of range; write a number above 0")
        if self.part is not None and self.part.start + self.max_steps > self.part.of:
            raise ValueError(
                f"part.of: {self.part.of} is less than the {self.part.start} steps before the stage and its "
                f"{self.max_steps}; write at least their sum"
            )

        for block in ("early_stopping", "samples"):
            if getattr(self, block) is not None and self.max_steps == 0:
                raise ValueError(f"{block}: the stage does not train, as max_steps is 0; leave it out")
        if self.prune is not None and not self.prune.at_once:
            how = "ramp" if self.prune.ramp is not None else "method"
            if self.early_stopping is not None:
                raise ValueError(
                    f"early_stopping: prune.{how} makes zeros until the stage ends, and the best validation would be "
                    "one with few of them; write it in a stage after this one"
                )
            if self.max_steps == 0:
                raise ValueError(f"prune.{how}: it prunes while training, and max_steps is 0; write sparsity: 0.5")
            if self.rewind is not None:
                raise ValueError(
                    f"prune.{how}: it prunes while training, and rewind needs zeros to put weights under at the start; "
                    "write sparsity: 0.5"
                )

        if self.model is not None and self.shrink is not None:
            raise ValueError("shrink: a stage with a model of its own has nothing to cut yet; write the size in model")
        if self.lora is not None and self.prune is not None:
            raise ValueError(
                "prune: lora freezes the weights of its stage; prune in a stage before, whose zeros it holds"
            )
        if self.lora is not None and self.lora.bits is not None and self.quantize is not None:
            raise ValueError(
                f"lora.bits: weights that are frozen in {self.lora.bits} bits cannot be quantized in the same stage; "
                "write bits: null, or quantize in a stage of its own after it"
            )

    @property
    def compresses(self) -> bool:
        """Whether this stage changes what the model can represent."""
        return any(block is not None for block in (self.quantize, self.prune, self.shrink, self.model, self.rewind))

    @property
    def schedule_steps(self) -> int:
        """Steps of the learning-rate schedule, which may be longer than the stage."""
        return self.max_steps if self.part is None else self.part.of
