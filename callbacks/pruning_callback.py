"""The base class of all pruning callbacks, which keeps pruned weights at zero through every optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.errors import QatkitError
from qatkit.pruning.layers import prunable_layers, warn_of_unprunable
from qatkit.pruning.masks import apply_masks, count_zeros, nonzeros
from qatkit.quantization.modules import FakeQuantize

AVERAGING = (WeightAveraging, StochasticWeightAveraging)
"""Weight-averaging callbacks: an average is zero only where the weight has been zero throughout."""


class PruningCallback(Callback):
    """Keep the pruned weights of some layers at zero through every optimizer step.

    The zeros are the mask. Before a step, the mask is read from the weights and applied to their gradients, so that
    clipping and momentum ignore pruned weights. After the step, the mask is applied to the weights, which momentum from
    an earlier step may have moved. No mask is stored between steps and no module is replaced, so checkpoints have the
    usual format. The callback's state records the number of zeros in every pruned layer, counted in the saved weights;
    on resume, the loaded weights must have the same numbers of zeros.

    Args:
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names to exclude.
    """

    prunes = True
    """Whether the callback prunes weights, rather than only keeping zeros."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        for key, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise QatkitError(f"'{patterns}' is not a list of patterns", key=key, advice=f"use ['{patterns}']")
        self.include = list(include)
        self.exclude = list(exclude)
        self.layers: list[str] = []
        """Names of the layers whose zeros are kept; set when training starts, or when a checkpoint is loaded."""
        self._module: weakref.ref[LightningModule] | None = None
        self._recorded: dict[str, int] | None = None  # zeros of every layer in the loaded checkpoint
        self._checked = True  # whether the loaded weights were compared with it
        self._step: list[tuple[nn.Parameter, Tensor]] | None = None  # during a step: pruned weights and their masks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise QatkitError(
                f"{type(trainer.strategy).__name__} flattens weights, so masks cannot be applied",
                key="strategy",
                advice="use 'ddp', or ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) for FSDP2",
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        for earlier in callbacks[: callbacks.index(self)]:
            if isinstance(earlier, WeightAveraging):
                raise QatkitError(
                    f"{type(earlier).__name__} would average weights before the mask is applied",
                    key="callbacks",
                    advice=f"put {type(self).__name__} before {type(earlier).__name__}",
                )
        if self.prunes:
            warn_of_unprunable(pl_module, self.include, self.exclude)
        self.layers, self._recorded, self._step = [], None, None
        self._module = weakref.ref(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # also with a checkpoint, so that a mistake in a pattern is reported before the checkpoint is read
        self.select(pl_module)
        # FSDP2 restores a checkpoint after this hook; without one, later callbacks (calibration) see pruned weights
        if trainer.ckpt_path is None:
            self.start(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_zeros(pl_module)
        if self._recorded is not None:
            self.resume(pl_module, self._recorded)
        elif trainer.ckpt_path is not None:
            self.start(pl_module)  # the checkpoint was written before this callback was added

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorded is not None and not self._checked:  # the checkpoint was at the last step
            self.resume(pl_module, self._recorded)

    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the layers that may be pruned, by name."""
        return prunable_layers(pl_module, self.include, self.exclude)

    def start(self, pl_module: LightningModule) -> None:
        """Prune before the first step, and set `layers`."""
        raise NotImplementedError

    def check_not_empty(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise an error if a weight is all zeros, like LoRA's initial B: it cannot be ranked and would never train."""
        weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        for name, zeros in count_zeros(weights).items():
            if zeros == weights[name].numel():
                raise QatkitError(
                    f"the weight of layer '{name}' is all zeros, so pruning would keep it at zero",
                    advice="exclude the layer",
                )

    def check_zeros(self, pl_module: LightningModule) -> None:
        """Raise an error if quantization turns the zeros of a layer into other values (Q4_K and others of GGUF)."""
        for name in self.select(pl_module) if self.prunes else self.layers:
            fake_quant = getattr(pl_module.get_submodule(name), "weight_fake_quant", None)
            if isinstance(fake_quant, FakeQuantize) and not fake_quant.spec.keeps_zeros:
                raise QatkitError(
                    f"layer '{name}': its quantization has no value for zero, so pruned weights would be non-zero",
                    advice="exclude the layer from pruning, or quantize it with Q3_K, Q6_K or Q4_0",
                )

    def resume(self, pl_module: LightningModule, recorded: dict[str, int]) -> None:
        """Continue with the mask of the loaded weights."""
        self.layers, self._checked = list(recorded), True
        weights = self.weights(pl_module)
        for name, zeros in count_zeros(weights).items():
            if zeros != recorded[name]:
                raise QatkitError(
                    f"layer '{name}' was saved with {recorded[name]} zeros in {weights[name].numel()} weights, but its "
                    f"loaded weight has {zeros}, so it was changed after loading",
                    advice="do not modify pruned weights after loading the checkpoint",
                )

    def weights(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """Return the weights of `layers` by layer name."""
        weights = {}
        for name in self.layers:
            try:
                weight = attrgetter(f"{name}.weight")(pl_module)  # several times faster than get_submodule
            except AttributeError:
                raise QatkitError(
                    f"the checkpoint has pruned weights in layer '{name}', which the module does not have",
                    advice="resume with the module that wrote the checkpoint",
                ) from None
            assert isinstance(weight, nn.Parameter)
            weights[name] = weight
        return weights

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._step is None:  # otherwise this is a second optimizer, or a second call of LBFGS, in the same batch
            self._step = []
            apply_masks(self._read(self.weights(pl_module).values(), self._step))
        else:
            apply_masks((weight.grad, mask) for weight, mask in self._step if weight.grad is not None)

    @staticmethod
    def _read(
        weights: Iterable[nn.Parameter], step: list[tuple[nn.Parameter, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the masks layer by layer, so that each is still in the cache when it is applied to its gradient."""
        for weight in weights:
            mask = nonzeros(weight)
            step.append((weight, mask))
            if weight.grad is not None:
                yield weight.grad, mask

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.reapply(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.reapply(pl_module)  # a checkpoint may be saved in the middle of a step

    def reapply(self, pl_module: LightningModule) -> None:
        """Apply the masks again after an optimizer step; do nothing if there was no step."""
        if self._step is not None:
            # in reverse order: the optimizer ended with the last layers, which may still be in the cache
            apply_masks(reversed(self._step))
        self._step = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)  # a Trainer may have several

    @override
    def state_dict(self) -> dict[str, Any]:
        module = self._module() if self._module is not None else None
        if module is None:
            unused = self._module is None and self._recorded is not None  # weights were loaded and not trained since
            return {"zeros": dict(self._recorded or {})} if unused else {}
        self.reapply(module)
        # Lightning's tuners save and restore before pruning starts: there is nothing to resume from yet
        return {"zeros": count_zeros(self.weights(module))} if self.layers else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorded = dict(state_dict["zeros"]) if "zeros" in state_dict else None
        # set here, because a fit whose checkpoint is at its last step never starts training
        self.layers, self._checked = list(self._recorded or ()), self._recorded is None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # nothing is trained
        pruning = [each for each in trainer.callbacks if isinstance(each, PruningCallback)]  # type: ignore[attr-defined]  # set by Lightning
        chosen = {name for each in pruning for name in each.select(pl_module)}
        own = {each.state_key for each in pruning}  # these were already checked when they were loaded
        for key, state in checkpoint.get("callbacks", {}).items():
            recorded = state.get("zeros") if isinstance(state, dict) and key not in own else None
            for name in recorded if isinstance(recorded, dict) else ():
                if name not in chosen:
                    raise QatkitError(
                        f"the checkpoint has pruned weights in layer '{name}', but no callback would keep them at zero",
                        advice="use the checkpoint's patterns, add ConstantPruning, or load its weights without "
                        "resuming",
                    )

    def __getstate__(self) -> dict[str, Any]:
        # a weak reference cannot be pickled, and the masks of a step belong to this module's weights
        return self.__dict__ | {"_module": None, "_step": None}
