"""A stage: one training run, and the blocks that configure it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qatkit.common.ranges import FLOAT32, Count, Fraction, Range, Steps, check_ranges
from qatkit.errors import QatkitError
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
    """One training run. A block is enabled if it is present. With ``max_steps: 0``, the stage does not train."""

    max_steps: Steps = MISSING
    batch_size: Count = 64
    """Samples per device per step."""
    lr: Annotated[float, Range(0.0, 100.0, above=True, example="1e-3")] = 1e-3
    weight_decay: Annotated[float, Range(0.0, 1e4)] = 0.01
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """AdamW from torch or bitsandbytes, the latter with 8-bit moments or with moments paged between GPU and host
    memory.
    """
    schedule: ScheduleName = "cosine"
    warmup: Fraction = 0.0
    """Fraction of the stage (0 to 1) over which the learning rate rises from zero."""
    decay: Annotated[float, Range(0.0, 1.0, above=True)] = 0.2
    """With schedule wsd (warmup, stable, decay), the final fraction of the stage over which the rate decays to zero."""
    gradient_clip: Annotated[float, Range(0.0, FLOAT32, above=True)] | None = None
    """Maximum global gradient norm."""
    accumulate: Count = 1
    """Batches per optimizer step."""
    early_stopping: EarlyStoppingConfig | None = None
    samples: SamplesConfig | None = None
    start: str | None = None
    """The earlier stage that this stage continues from. The default is the previous stage."""
    model: FactoryConfig | None = None
    """Start from this model, such as a small student, instead of the model of the previous stage."""
    shrink: ShrinkConfig | None = None
    distill: DistillConfig | None = None
    prune: PruneConfig | None = None
    hold_sparsity: bool = True
    """Keep pruned weights of earlier stages at zero."""
    quantize: QuantizeConfig | None = None
    lora: LoraConfig | None = None
    lottery: LotteryConfig | None = None
    """Find lottery tickets; the block is expanded into multiple stages, which replace this stage."""
    rewind: RewindConfig | None = None
    part: PartConfig | None = None

    def __post_init__(self) -> None:
        self._check_training()
        self._check_prune()
        self._check_blocks()

    def _check_training(self) -> None:
        check_ranges(self)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise QatkitError(
                f"{self.decay} and a warmup of {self.warmup} add up to more than 1",
                key="decay",
                advice="use two fractions that add up to at most 1",
            )
        if self.part is not None and self.part.start + self.max_steps > self.part.of:
            raise QatkitError(
                f"{self.part.of} is less than start={self.part.start} plus max_steps={self.max_steps}",
                key="part.of",
                advice=f"use at least {self.part.start + self.max_steps}",
            )
        for block in ("early_stopping", "samples"):
            if getattr(self, block) is not None and self.max_steps == 0:
                raise QatkitError(
                    "the stage does not train, because max_steps is 0", key=block, advice="remove the block"
                )

    def _check_prune(self) -> None:
        """Reject settings that do not work with a stage that prunes during training."""
        if self.prune is None or self.prune.at_once:
            return
        key = "prune.ramp" if self.prune.ramp is not None else "prune.method"
        if self.early_stopping is not None:
            raise QatkitError(
                f"{key} prunes until the stage ends, so the best validation loss would be at low sparsity",
                key="early_stopping",
                advice="move early_stopping to a later stage",
            )
        if self.max_steps == 0:
            raise QatkitError(
                "the stage prunes during training, but max_steps is 0", key=key, advice="use sparsity: 0.5"
            )
        if self.rewind is not None:
            raise QatkitError(
                "the stage prunes during training, but rewind needs the mask before the first step",
                key=key,
                advice="use sparsity: 0.5",
            )

    def _check_blocks(self) -> None:
        """Reject blocks that cannot be combined."""
        if self.start is not None and self.model is not None:
            raise QatkitError(
                f"'{self.start}' and a model are both set",
                key="start",
                advice="set only one of start and model",
            )
        if self.model is not None and self.shrink is not None:
            raise QatkitError(
                "shrink is not supported in a stage that sets its own model",
                key="shrink",
                advice="set the size in model.args",
            )
        if self.lora is not None and self.prune is not None:
            raise QatkitError(
                "lora freezes the weights of its stage, so they cannot be pruned",
                key="prune",
                advice="prune in an earlier stage; the lora stage keeps its sparsity",
            )
        if self.lora is not None and self.lora.bits is not None and self.quantize is not None:
            raise QatkitError(
                f"weights frozen in {self.lora.bits} bits cannot be quantized in the same stage",
                key="lora.bits",
                advice="set bits: null, or quantize in a later stage",
            )

    @property
    def compresses(self) -> bool:
        """Whether this stage quantizes, prunes, shrinks, replaces or rewinds the model."""
        return any(block is not None for block in (self.quantize, self.prune, self.shrink, self.model, self.rewind))

    @property
    def schedule_steps(self) -> int:
        """Length of the learning-rate schedule in steps, which may exceed the length of the stage."""
        return self.max_steps if self.part is None else self.part.of
