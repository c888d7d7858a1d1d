"""Low-rank adapters for any LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.launchers import refuse_spawn
from qatkit.callbacks.pruning_callback import PruningCallback
from qatkit.callbacks.quantization import QuantizationAwareTraining
from typing_extensions import override

from qatkit.errors import QatkitError, did_you_mean
from qatkit.lora.attachment import Adapter, attach, base_layers, check_inside, target_layers
from qatkit.lora.bits import Bits, check_backend, quantize_base
from qatkit.lora.heads import check_heads, classification_heads
from qatkit.quantization.layers import QATLayer

COMPUTE = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


class LoRA(Callback):
    """Freeze the module and train low-rank updates of some of its linear layers.

    The adapters are peft's. After `QuantizationAwareTraining`, and in layers with a sparsity mask, the update is part
    of the weight instead: ``W + alpha / rank * B A`` is quantized or masked, so merging does not change the outputs.
    Pass the optimizer all parameters, or those that require gradients: ``(p for p in self.parameters() if
    p.requires_grad)``. After training, `qatkit.lora.merge` merges the adapters, and `qatkit.lora.save_adapter` saves
    them.

    Args:
        rank: Rank of the update, which is the number of rows of A and columns of B.
        alpha: The update is multiplied by ``alpha / rank``.
        dropout: Dropout probability of the inputs of A during training.
        targets: Globs over names of linear layers; each must match. The output layer of a language model must be listed
            explicitly.
        dora: Use DoRA: train the magnitude of each output's weights separately from their direction.
        bits: Bit width, 4 or 8, to which bitsandbytes quantizes the frozen linear layers, except the output layer.
        quant_type: The bitsandbytes 4-bit data type.
        double_quant: Quantize the scales of 4-bit blocks to 8 bits.
        held: Names of layers whose pruned weights stay zero.
        seed: Seed for the initial values of A.

    Raises:
        QatkitError: a pattern matches nothing, options contradict each other, a layer cannot have an adapter, or the
            strategy or device is not supported.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import LoRA
        >>> trainer = Trainer(callbacks=[LoRA(rank=8, targets=["*.q_proj", "*.v_proj"], bits=4)])
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: Sequence[str] = ("*",),
        dora: bool = False,
        bits: Bits | None = None,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quant: bool = True,
        held: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        for name, patterns in (("targets", targets), ("held", held)):
            if isinstance(patterns, str):
                raise QatkitError(f"'{patterns}' is not a list of patterns", key=name, advice=f"use ['{patterns}']")
        if bits is not None and held:
            raise QatkitError(
                f"{bits}-bit weights do not support a sparsity mask (held)", key="bits", advice="set bits=None"
            )
        self.adapter = Adapter(rank, alpha, dropout, dora)
        self.targets = list(targets)
        self.bits = bits
        self.quant_type = quant_type
        self.double_quant = double_quant
        self.held = list(held)
        self.seed = seed
        self.layers: list[str] = []
        """Names of the layers with adapters, once `setup` has run."""
        self._module: weakref.ref[LightningModule] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._module is not None and self._module() is pl_module:
            return  # fit, then validate and test: attach only once
        self._check_callbacks(trainer)
        self._check_strategy(trainer)
        # all checks come before the first change, so an error leaves the module as it was
        names = target_layers(pl_module, self.targets)
        layers = {name: pl_module.get_submodule(name) for name in names}
        known = {name for name, _ in pl_module.named_modules()}
        if missing := [name for name in self.held if name not in known]:
            raise QatkitError(
                f"the module has no layer '{missing[0]}'", key="held", advice=did_you_mean(missing[0], known)
            )
        check_heads(classification_heads(pl_module), self.held)
        held = [name for name in self.held if name in layers]  # all other layers are frozen
        if held or any(isinstance(layer, QATLayer) for layer in layers.values()):
            check_inside(layers, self.adapter, bool(held))
        if self.bits is not None:
            self._quantize(trainer, pl_module)
        with isolate_rng():
            torch.manual_seed(self.seed)  # equal on all processes, as FSDP2 requires
            attach(pl_module, names, self.adapter, held)
        self.layers = names
        self._module = weakref.ref(pl_module)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.bits is not None
        if any(isinstance(module, QATLayer) for module in pl_module.modules()):
            raise QatkitError(
                f"weights that bitsandbytes quantizes to {self.bits} bits cannot also be fake-quantized",
                key="bits",
                advice="merge the adapters, and quantize in a separate call to fit",
            )
        check_backend(trainer.strategy.root_device)
        names, dtype = base_layers(pl_module), COMPUTE.get(str(trainer.precision))
        if not names:
            raise QatkitError(
                f"the module has no plain linear layer to quantize to {self.bits} bits",
                key="bits",
                advice="set bits=None",
            )
        # as Lightning does later with "bf16-true", so that dequantized weights get the dtype of all others
        trainer.precision_plugin.convert_module(pl_module)
        quantize_base(pl_module, names, self.bits, self.quant_type, self.double_quant, dtype)

    def _check_callbacks(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        position = callbacks.index(self)
        for other in callbacks:
            name = type(other).__name__
            if isinstance(other, PruningCallback):
                raise QatkitError(
                    f"{name} prunes weights that LoRA freezes",
                    key="callbacks",
                    advice="prune in an earlier call to fit, and use LoRA(held=[...]) with the pruned layers",
                )
            if isinstance(other, QuantizationAwareTraining) and callbacks.index(other) > position:
                raise QatkitError(
                    f"{name} must replace layers before LoRA adds adapters",
                    key="callbacks",
                    advice=f"put {name} before LoRA",
                )
            if isinstance(other, WeightAveraging) and callbacks.index(other) < position:
                raise QatkitError(
                    f"{name} copies the module before LoRA adds adapters",
                    key="callbacks",
                    advice=f"put LoRA before {name}",
                )

    def _check_strategy(self, trainer: Trainer) -> None:
        refuse_spawn(trainer, "LoRA")
        if self.bits is not None and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise QatkitError(
                f"{type(trainer.strategy).__name__} shards parameters, but it cannot shard weights that bitsandbytes "
                f"packs into {self.bits} bits",
                key="bits",
                advice="use strategy ddp, or set bits: null",
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_module": None}  # a weak reference cannot be pickled
