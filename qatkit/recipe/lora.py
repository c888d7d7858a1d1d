"""The ``lora`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from qatkit.common.ranges import Count, Range, check_ranges
from qatkit.errors import QatkitError


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank updates of frozen weights; the stage's result is the merged full-precision model."""

    rank: Count = 16
    """Rank of the update, which is the number of rows of A and columns of B."""
    alpha: Annotated[float, Range(0.0, 1e6, above=True, example="twice the rank")] = 32.0
    """The update is ``alpha / rank * B A``."""
    dropout: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """Dropout probability of the inputs of A during training."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Globs over the names of linear layers; each must match a layer. The output layer must be listed explicitly."""
    dora: bool = False
    """Use DoRA: train the magnitude of each output's weights separately from their direction."""
    bits: int | None = None
    """Bit width of the frozen weights of all linear layers except the output layer: 4 (QLoRA) or 8 (LLM.int8), or
    null."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The bitsandbytes 4-bit data type."""
    double_quant: bool = True
    """Quantize the scales of 4-bit blocks to 8 bits."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.targets:
            raise QatkitError("[] selects no layer", key="targets", advice="use ['*'], or remove the lora block")
        if self.bits not in (None, 4, 8):
            raise QatkitError(f"bitsandbytes does not support {self.bits} bits", key="bits", advice="use 4, 8 or null")
        if self.dora and self.bits == 8:
            raise QatkitError(
                "peft does not support DoRA with 8-bit weights", key="dora", advice="set bits: 4 or dora: false"
            )

    @property
    def title(self) -> str:
        """The usual name of the method, such as QLoRA.

        Example:
            >>> LoraConfig().title, LoraConfig(bits=4).title, LoraConfig(bits=8).title
            ('LoRA', 'QLoRA', 'LoRA over 8 bits')
        """
        name = ("Q" if self.bits == 4 else "") + ("DoRA" if self.dora else "LoRA")
        return f"{name} over 8 bits" if self.bits == 8 else name

    def check(self, key: str, zeros: bool, sharded: bool) -> None:
        """Raise an error if the block is not compatible with the rest of the recipe.

        Args:
            key: Key of the stage.
            zeros: Whether the stage keeps the sparsity mask of an earlier stage.
            sharded: Whether FSDP2 shards the parameters.

        Raises:
            QatkitError: an option is not supported; the message includes its name.
        """
        if sharded and self.bits is not None:
            raise QatkitError(
                f"FSDP2 shards floating-point parameters, but bitsandbytes packs {self.bits}-bit weights into bytes",
                key=f"{key}.lora.bits",
                advice="set trainer.strategy: ddp, or bits: null",
            )
        for name in ("dora", "dropout", "bits"):
            if zeros and (value := getattr(self, name)):
                raise QatkitError(
                    f"{value} is not supported with the sparsity mask of an earlier stage, because the mask is "
                    "applied to the low-rank update of the weight",
                    key=f"{key}.lora.{name}",
                    advice="remove the key, or set hold_sparsity: false",
                )
