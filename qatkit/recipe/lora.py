"""The ``lora`` block of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank updates of frozen weights; the stage's result is the merged model of full precision."""

    rank: int = 16
    alpha: float = 32.0
    """The update is ``alpha / rank * B A``."""
    dropout: float = 0.0
    """Share of the inputs of A that are dropped while training."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Globs over the names of linear layers; every one must match. The output layer has to be named."""
    dora: bool = False
    """Learn the length of every output's weights apart from their direction."""
    bits: int | None = None
    """4 (QLoRA) or 8 (LLM.int8): bitsandbytes holds the frozen weights of all linear layers but the output layer."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The grid of 4 bits."""
    double_quant: bool = True
    """Keep the scales of 4 bits in 8 bits as well."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is out of range; write a whole number of at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha: {self.alpha} is out of range; write a number above 0, such as twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is out of range; write a share from 0 to below 1")
        if not self.targets:
            raise ValueError("targets: [] selects no layer; write ['*'] or leave the lora block out")
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits: {self.bits} is not offered by bitsandbytes; write 4, 8 or null")
        if self.dora and self.bits == 8:
            raise ValueError("dora: peft cannot train it over 8 bits of bitsandbytes; write bits: 4 or dora: false")

    @property
    def title(self) -> str:
        """What the field calls it.

        Example:
            >>> LoraConfig().title, LoraConfig(bits=4).title, LoraConfig(bits=8).title
            ('LoRA', 'QLoRA', 'LoRA over 8 bits')
        """
        name = ("Q" if self.bits == 4 else "") + ("DoRA" if self.dora else "LoRA")
        return f"{name} over 8 bits" if self.bits == 8 else name

    def check(self, key: str, zeros: bool, sharded: bool) -> None:
        """Raise unless the block goes with the rest of the recipe.

        Args:
            key: Of the stage.
            zeros: The stage holds zeros of an earlier one.
            sharded: Parameters are sharded by FSDP2.
        """
        if sharded and self.bits is not None:
            raise ValueError(
                f"{key}.lora.bits: FSDP2 shards floating-point parameters, and bitsandbytes packs {self.bits} bits "
                "into bytes with scales beside them; write trainer.strategy: ddp, or bits: null"
            )
        for name in ("dora", "dropout", "bits"):
            if zeros and (value := getattr(self, name)):
                raise ValueError(
                    f"{key}.lora.{name}: {value} does not go with zeros that an earlier stage made: the update is "
                    "masked inside the weight; leave it out, or write hold_sparsity: false"
                )
