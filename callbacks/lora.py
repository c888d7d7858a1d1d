"""Low-rank adapters in anybody's LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.pruning_callback import PruningCallback
from qatkit.callbacks.quantization import QuantizationAwareTraining
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.lora.attach import Adapter, attach, base_layers, check_inside, target_layers
from qatkit.lora.bits import Bits, check_backend, quantize_base
from qatkit.lora.heads import check_heads, classification_heads
from qatkit.quantization.layers import QATLayer

COMPUTE = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


class LoRA(Callback):
    """Freezes the module and trains low-rank updates of some of its linear layers.

    The adapters are peft's. Behind `QuantizationAwareTraining`, and where zeros are held, they are part of the weight
    instead: what is rounded, or masked, is ``W + alpha / rank * B A``, so merging changes nothing. The optimizer has to
    take the parameters that require gradients: ``(p for p in self.parameters() if p.requires_grad)``, or all, of which
    frozen ones cost it nothing. `qatkit.lora.attach.merge` and `save_adapter` finish what was trained.

    Args:
        rank: Rows of A and columns of B.
        alpha: Scale of the update, divided by `rank`.
        dropout: Share of the inputs of A that are dropped while training.
        targets: Globs over names of linear layers; every one must match. The output layer of a language model has to be
            named.
        dora: Learn the length of every output's weights apart from their direction.
        bits: 4 or 8: bitsandbytes holds the frozen weights of all linear layers but the output layer.
        quant_type: The grid of 4 bits.
        double_quant: Keep the scales of 4 bits in 8 bits as well.
        held: Names of layers whose zeros stay zeros.
        seed: Random numbers that A starts with.

    Raises:
        QatkitError: a pattern matches nothing, settings that do not go together, or a strategy or device that cannot
            hold the weights.

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
                raise QatkitError(f"{name}: '{patterns}' is no list of patterns; write ['{patterns}']")
        if bits is not None and held:
            raise QatkitError(f"bits: {bits} bits do not go with held zeros; write bits=None")
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
            return  # fit, then validate and test: one attachment serves them all
        self._check_callbacks(trainer)
        self._check_strategy(trainer)
        # every check before the first change: after an error the module is still the user's
        names = target_layers(pl_module, self.targets)
        layers = {name: pl_module.get_submodule(name) for name in names}
        known = {name for name, _ in pl_module.named_modules()}
        if missing := [name for name in self.held if name not in known]:
            raise QatkitError(f"held: the module has no layer {missing}; write names such as '{names[0]}'")
        check_heads(classification_heads(pl_module), self.held)
        held = [name for name in self.held if name in layers]  # the others are frozen anyway
        if held or any(isinstance(layer, QATLayer) for layer in layers.values()):
            check_inside(layers, self.adapter, bool(held))
        if self.bits is not None:
            self._quantize(trainer, pl_module)
        with isolate_rng():
            torch.manual_seed(self.seed)  # the same on every process, which FSDP2 relies on
            attach(pl_module, names, self.adapter, held)
        self.layers = names
        self._module = weakref.ref(pl_module)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.bits is not None
        if any(isinstance(module, QATLayer) for module in pl_module.modules()):
            raise QatkitError(
                f"bits: weights that bitsandbytes holds in {self.bits} bits cannot be fake-quantized as well; merge "
                "the adapters, and quantize in a fit of its own"
            )
        check_backend(trainer.strategy.root_device)
        names, dtype = base_layers(pl_module), COMPUTE.get(str(trainer.precision))
        if not names:
            raise QatkitError(
                f"bits: the module has no plain linear layer to hold in {self.bits} bits; write bits=None"
            )
        # as Lightning does next where precision is "bf16-true": what is dequantized later has the dtype of all else
        trainer.precision_plugin.convert_module(pl_module)
        quantize_base(pl_module, names, self.bits, self.quant_type, self.double_quant, dtype)

    def _check_callbacks(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        position = callbacks.index(self)
        for other in callbacks:
            name = type(other).__name__
            if isinstance(other, PruningCallback):
                raise QatkitError(
                    f"callbacks: {name} masks weights, which LoRA freezes; prune in a fit before, and write "
                    "LoRA(held=[...]) with the layers whose zeros are to stay"
                )
            if isinstance(other, QuantizationAwareTraining) and callbacks.index(other) > position:
                raise QatkitError(f"callbacks: {name} has to swap layers before adapters are put on them; put it first")
            if isinstance(other, WeightAveraging) and callbacks.index(other) < position:
                raise QatkitError(f"callbacks: {name} copies the module before it has adapters; put LoRA before it")

    def _check_strategy(self, trainer: Trainer) -> None:
        if self.bits is not None and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise QatkitError(
                f"bits: {type(trainer.strategy).__name__} shards parameters, and what bitsandbytes packs into "
                f"{self.bits} bits cannot be sharded by it; write strategy ddp, or bits: null"
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_module": None}  # a weak reference cannot be pickled
