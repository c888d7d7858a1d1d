"""What every pruning callback shares: zeros that no optimizer step fills."""

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
from qatkit.pruning.layers import prunable_layers
from qatkit.pruning.masks import apply_masks, count_zeros, nonzeros

AVERAGING = (WeightAveraging, StochasticWeightAveraging)
"""Callbacks whose averages keep a zero only where it was one all along."""


class HeldZeros(Callback):
    """Keeps the zeros of some layers through every optimizer step.

    The zeros are the mask: before a step it is read from the weights and applied to their gradients, so that clipping
    and momentum see none of the pruned weights; after the step it is applied to the weights, which momentum from before
    may have moved. Nothing is kept between two steps and nothing is swapped, so a checkpoint is a plain one. It records
    the number of zeros of every held layer, measured in the weights it holds; on resuming, the weights must have as
    many.
    """

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise QatkitError(f"{name}: '{patterns}' is no list of patterns; write ['{patterns}']")
        self.include = list(include)
        self.exclude = list(exclude)
        self.layers: list[str] = []
        """Names of the held layers, once training has started."""
        self._module: weakref.ref[LightningModule] | None = None
        self._recorded: dict[str, int] | None = None
        self._step: list[tuple[nn.Parameter, Tensor]] | None = None  # within a step: held weights, their masks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise QatkitError(
                f"strategy: {type(trainer.strategy).__name__} keeps weights where masks cannot reach them; write "
                "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), which is FSDP2, or 'ddp'"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        for earlier in callbacks[: callbacks.index(self)]:
            if isinstance(earlier, WeightAveraging):
                raise QatkitError(
                    f"callbacks: {type(earlier).__name__} would average weights before their zeros are put back; put "
                    f"{type(self).__name__} before it"
                )
        self.layers, self._recorded, self._step = [], None, None
        self._module = weakref.ref(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.select(pl_module)  # also where a checkpoint follows: a mistake in a pattern shows before it is read
        # FSDP2 restores a checkpoint after this hook; without one, what comes next (calibration) sees pruned weights
        if trainer.ckpt_path is None:
            self.start(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorded is not None:
            self.resume(pl_module, self._recorded)
        elif trainer.ckpt_path is not None:
            self.start(pl_module)  # a checkpoint from before this callback was there

    def select(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """The layers that may be held."""
        return prunable_layers(pl_module, self.include, self.exclude)

    def start(self, pl_module: LightningModule) -> None:
        """Make the first zeros, and name the held layers."""
        raise NotImplementedError

    def check_not_empty(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise for a layer of zeros alone, as LoRA's adapters start: nothing in it could be ranked, nor ever train."""
        weights: dict[str, nn.Parameter] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
        for name, zeros in count_zeros(weights).items():
            if zeros == weights[name].numel():
                raise QatkitError(f"layer '{name}': it holds only zeros, which pruning would keep; exclude the layer")

    def resume(self, pl_module: LightningModule, recorded: dict[str, int]) -> None:
        """Go on with the zeros that the loaded weights have."""
        self.layers = list(recorded)
        weights = self.weights(pl_module)
        for name, zeros in count_zeros(weights).items():
            if zeros != recorded[name]:
                raise QatkitError(
                    f"layer '{name}': the checkpoint was saved with {recorded[name]} zeros of {weights[name].numel()} "
                    f"weights, but the weights that were loaded have {zeros}; something changed them on the way. Load "
                    "the checkpoint as it was saved"
                )

    def weights(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """The weights of the held layers."""
        found = {}
        for name in self.layers:
            try:
                weight = attrgetter(f"{name}.weight")(pl_module)  # get_submodule takes several times as long
            except AttributeError:
                raise QatkitError(
                    f"layer '{name}': the checkpoint holds its zeros, but the module has no such layer; resume with "
                    "the module that was trained"
                ) from None
            assert isinstance(weight, nn.Parameter)
            found[name] = weight
        return found

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._step is None:  # else a second optimizer, or a second call of LBFGS, in the same batch
            self._step = []
            apply_masks(self._read(self.weights(pl_module).values(), self._step))
        else:
            apply_masks((weight.grad, mask) for weight, mask in self._step if weight.grad is not None)

    @staticmethod
    def _read(
        weights: Iterable[nn.Parameter], step: list[tuple[nn.Parameter, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the masks, a layer at a time: each is still in the cache when its gradient takes it."""
        for weight in weights:
            mask = nonzeros(weight)
            step.append((weight, mask))
            if weight.grad is not None:
                yield weight.grad, mask

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.put_back(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.put_back(pl_module)  # a checkpoint may be saved in the middle of a step

    def put_back(self, pl_module: LightningModule) -> None:
        """After an optimizer step, set to zero what was; without a step there is nothing to do."""
        if self._step is not None:
            # backwards: the optimizer ended with the last layers, which the cache may still hold
            apply_masks(reversed(self._step))
        self._step = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(include=self.include, exclude=self.exclude)  # a Trainer may hold several

    @override
    def state_dict(self) -> dict[str, Any]:
        module = self._module() if self._module is not None else None
        if module is not None:
            self.put_back(module)
        # Lightning's tuners save and restore before there is a first zero: this is no checkpoint to go on from
        return {"zeros": count_zeros(self.weights(module))} if module is not None and self.layers else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorded = dict(state_dict["zeros"]) if "zeros" in state_dict else None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return  # nothing is trained
        holding = [each for each in trainer.callbacks if isinstance(each, HeldZeros)]  # type: ignore[attr-defined]  # set by Lightning
        chosen = {name for each in holding for name in each.select(pl_module)}
        own = {each.state_key for each in holding}  # theirs is checked where it is loaded
        for key, state in checkpoint.get("callbacks", {}).items():
            recorded = state.get("zeros") if isinstance(state, dict) and key not in own else None
            for name in recorded if isinstance(recorded, dict) else ():
                if name not in chosen:
                    raise QatkitError(
                        f"layer '{name}': the checkpoint holds its zeros, and no callback would go on with them; "
                        "resume with the patterns it was trained with, add ConstantPruning, or start from its weights "
                        "without resuming"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # a weak reference cannot be pickled, and copies of the weights of a step would be of no use
        return self.__dict__ | {"_module": None, "_step": None}
