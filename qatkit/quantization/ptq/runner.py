"""Set the starting point of quantization-aware training: weights and scales from a few batches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.observers import computed_qparams
from qatkit.quantization.prepare import fake_quantizers, qat_layers, quantized_weights
from qatkit.quantization.ptq.awq import awq_clip, awq_scales
from qatkit.quantization.ptq.blockwise import Run, capture, find_blocks, isolated, unquantized
from qatkit.quantization.ptq.equivalence import (
    BLOCKS,
    Fold,
    apply_fold,
    find_folds,
    fold_matrices,
    fold_tensors,
    parameter_uses,
)
from qatkit.quantization.ptq.gptq import gptq
from qatkit.quantization.ptq.hessian import InputStatistics, fits, watch
from qatkit.quantization.ptq.smoothquant import smoothquant_search
from qatkit.quantization.ranges import RangeObserver
from qatkit.spec import QuantSpec

Method = Literal["rtn", "mse", "gptq", "awq", "smoothquant"]


def initialise(
    model: nn.Module, method: Method, batches: Iterable[Any], forward: Callable[[Any], object] | None = None
) -> list[str]:
    """Set weights and weight scales of a prepared model so that it starts close to the float model, in place.

    "rtn" takes scales from ranges and "mse" from the least squared error of the weights; neither reads `batches`.
    "gptq" rounds the weights so that outputs change least. "awq" and "smoothquant" move scales between layers, which
    leaves the float model's function as it is; "awq" then clips. Call it before `calibrate`.

    Blocks that run one after the other (the layers of a transformer) are treated one by one, each on what the quantized
    blocks before it give; then everything outside of them. A model without such a list is one block. Inputs are not
    quantized meanwhile. Embeddings, grouped convolutions, fused experts and layers with shared or unused weights keep
    their own scales; a warning names those. In a process group every rank computes on its own: give all of them the
    same batches, and shard the model afterwards.

    Args:
        model: A model from `prepare_qat`.
        method: What to do.
        batches: What `forward` takes; all are kept in memory, and for every block one activation of each.
        forward: Runs the model on one batch; `model(batch)` by default.

    Returns:
        Names of the layers that the method has set.

    Raises:
        QatkitError: no batches; activations that are not finite; scales that are computed from the weights, with "mse",
            "gptq" and "awq"; a block whose layers are not known, or inputs that are calibrated, with "awq" and
            "smoothquant". The model is as it was.

    Example:
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=4, observer="lsq"))
        >>> initialise(model, "gptq", [torch.randn(32, 8)])
        ['0', '2']
    """
    check_method(model, method)
    undo = Undo()
    try:
        if method in ("rtn", "mse"):
            return _from_weights(model, method, undo)
        with isolated(model), _unquantized_caches(model):
            return _Initialiser(model, method, undo).run(list(batches), forward or model)
    except BaseException:
        undo()
        raise


def check_method(model: nn.Module, method: str) -> None:
    """Refuse what `initialise` refuses before it reads a batch; the prepared model may be on the meta device.

    Raises:
        QatkitError: as `initialise` says.
    """
    if method not in get_args(Method):
        raise QatkitError(f"method: '{method}' is unknown; write one of {', '.join(get_args(Method))}")
    weights = quantized_weights(model)
    if not weights and not qat_layers(model):
        raise QatkitError(f"{method}: the model has no fake-quantized layer; call prepare_qat before")
    if not weights and method != "smoothquant":
        raise QatkitError(f"{method}: it sets weights and their scales, and no weight is quantized; give a weight spec")
    if method in ("gptq", "awq", "smoothquant"):
        _Initialiser(model, method, Undo()).folds(find_blocks(model))
    else:
        for name, _, fake_quant in weights:
            if fake_quant.computed:
                _refuse_computed(name, fake_quant, method)


@contextmanager
def _unquantized_caches(model: nn.Module) -> Iterator[None]:
    """Keys and values are not quantized meanwhile: their ranges are calibrated later."""
    inputs = {id(layer.input_fake_quant) for _, layer in qat_layers(model)}
    caches = [fq for _, fq in fake_quantizers(model) if fq.role == "activation" and id(fq) not in inputs]
    try:
        for fake_quant in caches:
            fake_quant.observer = RangeObserver()  # what is watched passes as it is
        yield
    finally:
        for fake_quant in caches:
            fake_quant.observer = None


class Undo:
    """Remembers tensors as they were before they are changed, on the CPU."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, *tensors: Tensor | None) -> None:
        """Remember tensors that are about to change; what is remembered stays."""
        for tensor in tensors:
            if tensor is not None and id(tensor) not in self._before:
                self._before[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """Put everything back."""
        for tensor, before in self._before.values():
            tensor.copy_(before)


def _from_weights(model: nn.Module, method: str, undo: Undo) -> list[str]:
    names = []
    for name, weight, fake_quant in quantized_weights(model):
        if fake_quant.computed:
            continue
        undo.keep(*fake_quant.parameters(), *fake_quant.buffers())
        fake_quant.initialize(weight)
        if method == "rtn":
            fake_quant.set_qparams(*computed_qparams(weight, fake_quant.spec))
        names.append(name)
    return names


def _refuse_computed(name: str, fake_quant: FakeQuantize, method: str) -> None:
    if method in ("mse", "gptq", "awq"):
        raise QatkitError(
            f"layer '{name}': {method} sets scales, but with observer: {fake_quant.spec.observer} they are computed "
            "from the weight on every call; write observer: mse (the scale stays) or lsq (learned)"
        )


class _Initialiser:
    """One call of `initialise` with a method that reads batches."""

    def __init__(self, model: nn.Module, method: str, undo: Undo) -> None:
        self.model, self.method, self.undo = model, method, undo
        self.names = {layer: name for name, layer in qat_layers(model)}
        self.uses = parameter_uses(model)
        self.done: list[str] = []
        plain = {name for name, *_ in quantized_weights(model)} - set(self.names.values())
        self.left = dict.fromkeys(sorted(plain), "fused experts")
        self._check()

    def run(self, batches: list[Any], forward: Callable[[Any], object]) -> list[str]:
        """Treat block after block, then the layers outside of them."""
        if not batches:
            raise QatkitError(f"{self.method}: the data gave no batch; it needs at least one")
        layers, blocks = list(self.names), find_blocks(self.model)
        folds = self.folds(blocks)
        with unquantized(layers, "input_fake_quant"):
            with unquantized(layers, "weight_fake_quant"):
                runs = capture(blocks, batches, forward)
            if runs is None:
                blocks, runs = [], []
            treated: set[nn.Module] = set()
            for index, block in enumerate(blocks):
                inside = [layer for layer in block.modules() if isinstance(layer, QATLayer)]
                self._treat(inside, folds, functools.partial(_through, runs, block, index))
                treated.update(inside)
                for run in runs:
                    run.hidden = run.through(block, index)
            runs.clear()
            rest = [layer for layer in layers if layer not in treated]
            if rest:
                self._treat(rest, folds, lambda: (forward(batch) for batch in batches))
        if self.left and self.method != "smoothquant":
            kept = ", ".join(f"{name} ({why})" for name, why in self.left.items())
            warnings.warn(f"{self.method}: these layers keep their own scales: {kept}", QatkitWarning, stacklevel=3)
        return self.done

    def _check(self) -> None:
        for layer, name in self.names.items():
            if hasattr(layer.weight, "device_mesh"):
                raise QatkitError(f"layer '{name}': its weight is sharded; call initialise before fully_shard")
            weight, inputs = layer.weight_fake_quant, layer.input_fake_quant
            if weight is not None and weight.computed and fits(layer):
                _refuse_computed(name, weight, self.method)
            if self.method != "gptq" and inputs is not None and not inputs.computed and inputs.ready:
                raise QatkitError(
                    f"layer '{name}': {self.method} changes the range of its input, which is already calibrated; call "
                    "initialise before calibrate"
                )

    def folds(self, blocks: list[nn.Module]) -> list[Fold]:
        """Where the method moves scales; none with gptq."""
        if self.method == "gptq":
            return []
        for block in blocks or [self.model]:
            if qat_layers(block) and not find_folds(block, self.uses):
                raise QatkitError(
                    f"{self.method}: nothing is known about what comes before the layers of a {type(block).__name__} "
                    f"of {type(self.model).__name__}; known are {', '.join(BLOCKS)} and nn.Sequential of Linear and "
                    "ReLU; use gptq"
                )
        return find_folds(self.model, self.uses)

    def _treat(self, inside: list[QATLayer], folds: list[Fold], runs: Callable[[], Iterator[object]]) -> None:
        """Watch the inputs of some layers while the model runs with their plain weights, then set them."""
        watched = {layer: InputStatistics(self.method != "smoothquant") for layer in inside if fits(layer)}
        with ExitStack() as stack:
            stack.enter_context(unquantized(inside, "weight_fake_quant"))
            for layer, statistics in watched.items():
                stack.callback(layer.register_forward_pre_hook(_watcher(statistics), with_kwargs=True).remove)
            for _ in runs():
                pass
        for layer, statistics in watched.items():
            if not statistics.finite:
                raise QatkitError(f"{self.method}: the input of layer '{self.names[layer]}' is not finite")
        for fold in folds:
            if any(consumer in watched for consumer in fold.consumers):
                self._fold(fold, watched)
        if self.method == "smoothquant":
            return
        for layer in inside:
            fake_quant = layer.weight_fake_quant
            if fake_quant is None:
                continue
            reason = self._reason(layer, watched.get(layer))
            if reason:
                self.left[self.names[layer]] = reason
            else:
                self._set(layer, fake_quant, watched.pop(layer).hessian)

    def _reason(self, layer: QATLayer, statistics: InputStatistics | None) -> str:
        """Why a layer keeps its own scale; nothing if it does not."""
        if statistics is None:
            return "grouped convolution" if isinstance(layer, nn.Conv1d | nn.Conv2d) else "embedding"
        if self.uses[id(layer.weight)] > 1:
            return "shared weight"
        return "no input reached it" if statistics.rows == 0 else ""

    @torch.no_grad()
    def _set(self, layer: QATLayer, fake_quant: FakeQuantize, hessian: Tensor) -> None:
        matrix = layer.matrix
        self.undo.keep(layer.weight, *fake_quant.parameters(), *fake_quant.buffers())
        if fake_quant.spec.two_level:
            fake_quant.initialize(matrix)  # the scale over the scales
        if self.method == "gptq":
            rounded, *qparams = gptq(matrix.flatten(1), hessian, fake_quant.spec)
            layer.set_matrix(rounded.view_as(matrix))
        else:
            qparams = list(awq_clip(matrix.flatten(1), hessian, fake_quant.spec))
        fake_quant.set_qparams(*qparams)
        self.done.append(self.names[layer])

    def _fold(self, fold: Fold, watched: dict[QATLayer, InputStatistics]) -> None:
        """Find the scales of one input and move them into what makes it."""
        readers = [consumer for consumer in fold.consumers if isinstance(consumer, QATLayer) and consumer in watched]
        statistics = watched[readers[0]]
        if statistics.rows == 0:
            return
        if self.method == "smoothquant":
            scales = smoothquant_search(
                [reader.matrix for reader in readers],
                [_spec(reader.weight_fake_quant) for reader in readers],
                [_spec(reader.input_fake_quant) for reader in readers],
                statistics,
                torch.stack([matrix.abs().amax(0) for matrix in fold_matrices(fold)]).amax(0),
            )
        else:
            quantized = [(r.matrix.detach(), r.weight_fake_quant.spec) for r in readers if r.weight_fake_quant]
            if not quantized:
                return
            matrices, specs = zip(*quantized, strict=True)
            scales = awq_scales(matrices, specs, statistics.magnitude, statistics.hessian)
        self.undo.keep(*fold_tensors(fold))
        apply_fold(fold, scales)
        for layer in (fold.producer, *fold.consumers):
            if not isinstance(layer, QATLayer):
                continue
            fake_quant = layer.weight_fake_quant
            if fake_quant is not None and not fake_quant.computed:
                self.undo.keep(*fake_quant.parameters(), *fake_quant.buffers())
                fake_quant.initialize(layer.matrix)
        for layer in readers:
            watched[layer].rescale(scales)
            if self.method == "smoothquant":
                self.done.append(self.names[layer])


def _spec(fake_quant: FakeQuantize | None) -> QuantSpec | None:
    return None if fake_quant is None else fake_quant.spec


def _through(runs: list[Run], block: nn.Module, index: int) -> Iterator[object]:
    return (run.through(block, index) for run in runs)


def _watcher(statistics: InputStatistics) -> Callable[..., None]:
    def hook(layer: QATLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        watch(layer, args[0] if args else next(iter(kwargs.values())), statistics)

    return hook
