"""Quantization-aware training for any LightningModule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # not in its __all__
from lightning.pytorch.utilities.seed import isolate_rng
from qatkit.callbacks.batches import as_training_does, first_batches, module_forward, on_every_process
from qatkit.callbacks.launchers import refuse_spawn
from qatkit.callbacks.placement import module_placement
from qatkit.callbacks.targets import check_target
from qatkit.callbacks.weight_decay import DecayExemption
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from qatkit.errors import QatkitError, did_you_mean
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS
from qatkit.quantization.calibration import calibrate
from qatkit.quantization.coverage import coverage
from qatkit.quantization.folding import Fold, fold_batchnorm
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.placement.points import Placement, place
from qatkit.quantization.prepare import fake_quantizers, prepare_qat
from qatkit.quantization.ptq.methods import METHODS
from qatkit.quantization.ptq.runner import apply_ptq
from qatkit.quantization.selection import check_arguments, select
from qatkit.quantization.state import layer_specs
from qatkit.quantization.targets import TARGETS, Target, check_placed, warn_of_slow_layers
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

QUANTIZED = "(quantized: load it with qatkit.callbacks.load_quantized)"
"""Key in a checkpoint's state dict; it appears in the error if a plain module loads the checkpoint."""


class QuantizationAwareTraining(Callback):
    """Train with fake-quantized weights and activations.

    Before training, BatchNorm is folded into the preceding convolutions (BatchNorm that cannot be folded keeps its
    statistics frozen). The selected layers are replaced, and static activation ranges are calibrated on the first
    training batches. Each fake quantizer must run in the first training step. Learned scales are exempt from weight
    decay. A checkpoint contains the same weights under the same names, plus the scales; a resumed run continues with
    those scales.

    Args:
        weight: Quantization of weights; None leaves them in full precision.
        activation: Quantization of layer inputs; None leaves them in full precision.
        include: Globs over layer names of the LightningModule; each must match a layer.
        exclude: Globs over layer names that are not quantized.
        layers: Overrides by glob; the last matching glob wins.
        kv_cache: Quantization of the KV cache of a transformers model.
        share_inputs: Share one static input scale between layers with the same input (q/k/v, gate/up).
        init: Starting point of weights and scales: "gptq", "awq" or "smoothquant" use the calibration batches; "rtn" or
            "mse" use only the weights. By default, learned and static weight scales start where the squared error is
            smallest.
        calibration_batches: Number of training batches for static ranges and for `init`.
        calibration_forward: Runs the LightningModule on one batch. The default is ``module(*inputs)``, where the inputs
            are the batch, its first element if it is a tuple or list, or its items as keyword arguments if it is a
            dict.
        target: Name of the runtime that will run the trained model, such as "onnxruntime" (see
            `qatkit.quantization.TARGETS`), or of its export format, such as "onnx" (see `qatkit.export.FORMATS`). An
            unsupported model raises an error before training. A runtime also provides the defaults of `weight` and
            `activation`, and tensors that its integer kernels read or write are quantized.

    Raises:
        QatkitError: a pattern matches nothing; a selected layer cannot be quantized or exported, or never runs; or the
            strategy would lose the trained weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit import QuantSpec
        >>> from qatkit.callbacks import QuantizationAwareTraining
        >>> trainer = Trainer(callbacks=[QuantizationAwareTraining(weight=QuantSpec(num_bits=4, observer="lsq"))])
    """

    def __init__(
        self,
        weight: QuantSpec | None = None,
        activation: QuantSpec | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        layers: Mapping[str, Scheme] | None = None,
        kv_cache: QuantSpec | None = None,
        share_inputs: bool = False,
        init: str | None = None,
        calibration_batches: int = 16,
        calibration_forward: Callable[[LightningModule, Any], object] | None = None,
        target: str | None = None,
    ) -> None:
        runtime = TARGETS.get(target) if target is not None else None
        if runtime is not None:
            weight, activation = weight or runtime.weight, activation or runtime.activation
            check_placed(activation, runtime.name)
        check_arguments(weight, activation, include, exclude, layers or {}, kv_cache)
        if init is not None:
            METHODS.row(init, "init")
        if calibration_batches < 1:
            raise QatkitError(
                f"{calibration_batches} is out of range",
                key="calibration_batches",
                advice="use a positive integer",
            )
        self.target = _format_of(target, runtime)
        self.places = runtime if activation is not None and not activation.scaled_per_batch else None
        self.weight = weight
        self.activation = activation
        self.include = list(include)
        self.exclude = list(exclude)
        self.overrides = dict(layers or {})
        self.kv_cache = kv_cache
        self.share_inputs = share_inputs
        self.init = init
        self.calibration_batches = calibration_batches
        self.calibration_forward = calibration_forward or module_forward
        self.layers: list[str] = []
        """Names of the swapped layers, once `setup` has run."""
        self.folds: list[Fold] = []
        """Folded (convolution, BatchNorm) pairs."""
        self.placement = Placement()
        """Results of layers and operations that are quantized in addition to layer inputs."""
        self._module: weakref.ref[LightningModule] | None = None
        self._frozen: list[_BatchNorm] = []  # BatchNorm that could not be folded keeps its statistics
        self._ptq_done = False
        self._all_ran = False
        self._decay = DecayExemption()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._module is not None and self._module() is pl_module:
            return  # fit, then validate and test: swap only once
        refuse_spawn(trainer, "QuantizationAwareTraining")
        self._check_order(trainer)
        self._check_precision(trainer)
        self._precede_finders(trainer)
        # all checks come before the first change, so an error leaves the module as it was
        how = (self.weight, self.activation, self.include, self.exclude, self.overrides, self.kv_cache)
        schemes = select(pl_module, *how)
        if self.target is not None:
            codes = self.places is not None and self.places.linear_codes
            check_target(self.target, trainer, pl_module, schemes, self.kv_cache is not None, codes)
        if self.places is not None:
            warn_of_slow_layers(pl_module, self.places.name, schemes)
        if self.places is not None and self.activation is not None:
            self.folds, self.placement = module_placement(
                trainer, pl_module, self.calibration_forward, schemes, self.activation, self.places
            )
        else:
            self.folds = fold_batchnorm(pl_module)
        self.layers = prepare_qat(pl_module, *how, self.share_inputs)
        place(pl_module, self.placement)
        rank_zero_info(str(coverage(pl_module)))
        pl_module.register_load_state_dict_pre_hook(_drop_mark)  # type: ignore[no-untyped-call]
        self._frozen = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._module = weakref.ref(pl_module)
        self._ptq_done = self._all_ran = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # FSDP2 restores a checkpoint after this hook, so `ready` does not show yet that scales are loaded
        if trainer.ckpt_path is not None:
            self._ptq_done = True  # the checkpoint has its starting point; so does a fit after this one
            return
        if self.init is None and all(fq.ready for _, fq in self._own(pl_module)):
            return
        trainer.fit_loop.setup_data()  # outside `isolate_rng`: it draws the seed of the training order
        if self.init is not None and not self._ptq_done:
            self._apply_ptq(trainer, pl_module, self.init)
        self._ptq_done = True  # a second fit continues from the first
        if not all(fq.ready for _, fq in self._own(pl_module)):
            self._calibrate(trainer, pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None and average.n_averaged == 0:  # a copy from before the scales were set
                average.module.load_state_dict(pl_module.state_dict())

    def _check_order(self, trainer: Trainer) -> None:
        for earlier in trainer.callbacks[: trainer.callbacks.index(self)]:  # type: ignore[attr-defined]  # set by Lightning
            if isinstance(earlier, WeightAveraging | StochasticWeightAveraging):
                raise QatkitError(
                    f"{type(earlier).__name__} copies the module before its layers are quantized, so it would average "
                    "unquantized weights",
                    key="callbacks",
                    advice=f"put QuantizationAwareTraining before {type(earlier).__name__}",
                )

    def _precede_finders(self, trainer: Trainer) -> None:
        """Move finders, which Lightning puts first, behind this callback: they train, so scales must be set before they
        run."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
        others = [c for c in callbacks if not isinstance(c, LearningRateFinder | BatchSizeFinder)]
        own = others.index(self) + 1
        finders = [c for c in callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)]
        trainer.callbacks = [*others[:own], *finders, *others[own:]]  # type: ignore[attr-defined]

    def _check_precision(self, trainer: Trainer) -> None:
        """Raise an error if learned scales cannot be sharded: float32 with half precision, or shared by layers."""
        specs = [self.weight, self.activation, *(spec for s in self.overrides.values() for spec in vars(s).values())]
        sharded = isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy)
        if sharded and self.places and self.activation is not None and self.activation.learned:
            raise QatkitError(
                f"'{self.activation.observer}' is not supported with a target on {type(trainer.strategy).__name__}: "
                "layers in different shards would share a learned scale",
                key="activation.observer",
                advice="use minmax or mse for activations",
            )
        if sharded and str(trainer.precision).endswith("16-true") and any(spec and spec.learned for spec in specs):
            raise QatkitError(
                f"'{trainer.precision}' is not supported with learned scales on {type(trainer.strategy).__name__}: it "
                "can shard only parameters of the same dtype together, and scales are float32",
                key="precision",
                advice="use bf16-mixed, or observer: mse, whose scales are buffers",
            )

    @property
    @override
    def state_key(self) -> str:
        # a Trainer may hold several
        return self._generate_state_key(include=self.include, exclude=self.exclude, layers=list(self.overrides))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the settings with which `load_quantized` rebuilds the module, whose state dict contains the scales."""
        module = self._module() if self._module is not None else None
        specs = {} if module is None else layer_specs(module)
        own = {name: specs[name] for name in self.layers if name in specs}
        return {"folds": self.folds, "specs": own, "placement": self.placement.as_dict()}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            checkpoint["state_dict"][QUANTIZED] = torch.empty(0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_module": None, "_frozen": []}  # a weak reference cannot be pickled

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolate_rng():
            calibrate(pl_module, self._batches(trainer), as_training_does(trainer, pl_module, self.calibration_forward))

    def _apply_ptq(self, trainer: Trainer, pl_module: LightningModule, method: str) -> None:
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            raise QatkitError(
                f"'{method}' requires unsharded weights, but FSDP2 shards them",
                key="init",
                advice=f"run {method} in a separate stage with max_steps: 0 on one process or with strategy: ddp, and "
                "train from its result",
            )
        forward = as_training_does(trainer, pl_module, self.calibration_forward)
        with isolate_rng():
            on_every_process(lambda: apply_ptq(pl_module, method, self._batches(trainer), forward))
        if dist.is_available() and dist.is_initialized():
            # each process saw different batches; all take the result of the first
            for tensor in pl_module.state_dict().values():
                dist.broadcast(tensor, 0)

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        return first_batches(trainer.train_dataloader, self.calibration_batches)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, fake_quant in self._own(pl_module):
            fake_quant.ran = False  # calibration and the sanity check may run quantizers that training never runs

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for norm in self._frozen:
            norm.eval()  # Lightning puts it back into training mode after validation

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._decay.split(optimizer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._decay.join()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._decay.join()  # if the gradient scaler skipped the step, no hook restored the groups
        if self._all_ran:
            return
        idle = [name for name, fq in self._own(pl_module) if not fq.ran]
        if idle:
            layers = sorted({name.rpartition(".")[0] for name in idle})
            raise QatkitError(
                f"training never calls forward on the quantized layers {layers}; their weights are used by "
                "another module or are unused",
                key="include",
                advice="add these layers to exclude",
            )
        self._all_ran = True

    def _own(self, pl_module: LightningModule) -> list[tuple[str, FakeQuantize]]:
        """Return the fake quantizers of this callback; a Trainer may hold several such callbacks."""
        own = {*self.layers, *(point.module for point in self.placement.points)}
        return [(name, fq) for name, fq in fake_quantizers(pl_module) if name.rpartition(".")[0] in own]


def _format_of(target: str | None, runtime: Target | None) -> ExportFormat | None:
    if target is None:
        return None
    if runtime is not None:
        return FORMATS[runtime.formats[0]]
    if target not in FORMATS:
        known = [*TARGETS, *FORMATS]
        raise QatkitError(
            f"there is no runtime or export format '{target}'", key="target", advice=did_you_mean(target, known)
        )
    return FORMATS[target]


def _drop_mark(module: LightningModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(f"{prefix}{QUANTIZED}", None)
