"""Apply a PTQ method to a prepared model, as the starting point of training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.tables import implementation
from qatkit.errors import QatkitError, QatkitWarning
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.parts import QATParts
from qatkit.quantization.prepare import fake_quantizers, qat_layers, qat_weights, quantized_weights
from qatkit.quantization.ptq.blockwise import Run, capture, find_blocks, isolated, unquantized
from qatkit.quantization.ptq.equivalence import (
    BLOCKS,
    Fold,
    SharedInput,
    apply_fold,
    find_folds,
    fold_matrices,
    fold_tensors,
    parameter_uses,
)
from qatkit.quantization.ptq.hessian import InputStatistics, is_matrix_product, record_inputs
from qatkit.quantization.ptq.methods import METHODS, Method
from qatkit.quantization.ptq.undo import Undo
from qatkit.quantization.ranges import RangeObserver


def apply_ptq(
    model: nn.Module, method: str, batches: Iterable[Any], forward: Callable[[Any], object] | None = None
) -> list[str]:
    """Set the weights and weight scales of a prepared model with a PTQ method, in place.

    "rtn" computes scales from ranges, and "mse" minimizes the squared error of the weights; neither uses `batches`.
    "gptq" rounds the weights to minimize the change in outputs. "awq" and "smoothquant" move scales between layers,
    which does not change the outputs of the float model; "awq" then clips ranges. Call this function before
    `calibrate`.

    Blocks that run in sequence (the layers of a transformer) are processed one by one, each with the outputs of the
    preceding quantized blocks. Layers outside the blocks are processed last. A model without a list of blocks is
    treated as one block. Inputs are not quantized during this step. These layers keep their scales, and a warning lists
    them: embeddings; grouped, transposed and 3-D convolutions; layers with multiple weights (fused experts, the input
    projections of attention); and layers with shared or unused weights. In a process group, every rank computes
    independently, so pass the same batches to every rank, and shard the model afterwards.

    Args:
        model: A model prepared by `prepare_qat`.
        method: A name in `METHODS`.
        batches: Batches to pass to `forward`. All batches stay in memory, plus one activation per batch for the current
            block.
        forward: Runs the model on one batch. The default is `model(batch)`.

    Returns:
        Names of the layers whose weights or scales the method set.

    Raises:
        QatkitError: There are no batches; activations are non-finite; with "mse", "gptq" or "awq", a weight scale is
            computed in every forward pass; with "awq" or "smoothquant", a block's layers are unknown or its inputs are
            already calibrated. In all cases, the model is unchanged.

    Example:
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=4, observer="lsq"))
        >>> apply_ptq(model, "gptq", [torch.randn(32, 8)])
        ['0', '2']
    """
    check_method(model, method)
    row, undo = METHODS[method], Undo()
    try:
        if not row.reads_batches:
            return _from_weights(model, row, undo)
        with isolated(model), _unquantized_caches(model):
            return _BatchMethod(model, row, undo).run(list(batches), forward or model)
    except BaseException:
        undo()
        raise


def check_method(model: nn.Module, method: str) -> None:
    """Run the checks of `apply_ptq` that do not need batches; the model may be on the meta device.

    Raises:
        QatkitError: As in `apply_ptq`.
    """
    row = METHODS.row(method, "method")
    weights = quantized_weights(model)
    if not weights and not qat_layers(model):
        raise QatkitError(f"{method}: the model has no fake-quantized layer", advice="call prepare_qat first")
    if not weights and row.needs_weights:
        raise QatkitError(
            f"{method} sets weights and their scales, but no weight is quantized", advice="add a weight spec"
        )
    if row.reads_batches:
        _BatchMethod(model, row, Undo()).folds(find_blocks(model))
    elif row.stored_scales:
        for name, _, fake_quant in weights:
            if _computes_scale(fake_quant):
                raise _computed_scale(name, fake_quant, row)


def _from_weights(model: nn.Module, method: Method, undo: Undo) -> list[str]:
    estimate = implementation(method.from_weight)
    names = []
    for name, weight, fake_quant in quantized_weights(model):
        if fake_quant.computed:
            continue
        undo.keep(*fake_quant.parameters(), *fake_quant.buffers())
        fake_quant.initialize(weight, estimate)
        names.append(name)
    return names


def _computes_scale(fake_quant: FakeQuantize) -> bool:
    """Whether a method that sets scales would have no effect; types without a scale are left as they are."""
    return fake_quant.computed and fake_quant.spec.element.scaled


def _computed_scale(name: str, fake_quant: FakeQuantize, method: Method) -> QatkitError:
    return QatkitError(
        f"layer '{name}': {method.name} sets scales, but observer '{fake_quant.spec.observer}' computes them from the "
        "weight on every call",
        advice="use observer: mse (a stored scale) or lsq (a learned scale)",
    )


@contextmanager
def _unquantized_caches(model: nn.Module) -> Iterator[None]:
    """Leave keys and values unquantized: their ranges are calibrated later."""
    inputs = {id(layer.input_fake_quant) for _, layer in qat_layers(model)}
    caches = [fq for _, fq in fake_quantizers(model) if fq.role == "activation" and id(fq) not in inputs]
    try:
        for fake_quant in caches:
            fake_quant.observer = RangeObserver()  # a quantizer with an observer returns its input unchanged
        yield
    finally:
        for fake_quant in caches:
            fake_quant.observer = None


class _BatchMethod:
    """One call of `apply_ptq` with a method that reads batches."""

    def __init__(self, model: nn.Module, method: Method, undo: Undo) -> None:
        self.model, self.method, self.undo = model, method, undo
        self.names = {layer: name for name, layer in qat_layers(model)}
        self.uses = parameter_uses(model)
        self.done: list[str] = []
        self.skipped = {w.name: w.layer.kind for w in qat_weights(model) if isinstance(w.layer, QATParts)}
        self._check()

    def run(self, batches: list[Any], forward: Callable[[Any], object]) -> list[str]:
        """Process block after block, then the layers outside the blocks."""
        if not batches:
            raise QatkitError(
                f"{self.method.name} needs at least one batch, but got none", key="batches",
                advice="pass a data loader that is not empty",
            )  # fmt: skip
        layers, blocks = list(self.names), find_blocks(self.model)
        folds = self.folds(blocks)
        with unquantized(layers, "input_fake_quant"):
            with unquantized(layers, "weight_fake_quant"):
                runs = capture(blocks, batches, forward)
            if runs is None:
                blocks, runs = [], []
            processed: set[nn.Module] = set()
            for index, block in enumerate(blocks):
                inside = [layer for layer in block.modules() if isinstance(layer, QATLayer)]
                self._process(inside, folds, functools.partial(_through, runs, block, index))
                processed.update(inside)
                for run in runs:
                    run.hidden = run.through(block, index)
            runs.clear()
            rest = [layer for layer in layers if layer not in processed]
            if rest:
                self._process(rest, folds, lambda: (forward(batch) for batch in batches))
        if self.skipped:
            names = ", ".join(f"{name} ({reason})" for name, reason in self.skipped.items())
            warnings.warn(f"{self.method.name}: these layers keep their scales: {names}", QatkitWarning, stacklevel=3)
        return self.done

    def _check(self) -> None:
        for layer, name in self.names.items():
            if hasattr(layer.weight, "device_mesh"):
                raise QatkitError(
                    f"the weight of layer '{name}' is sharded", advice="call apply_ptq before fully_shard"
                )
            weight, inputs = layer.weight_fake_quant, layer.input_fake_quant
            sets_scale = self.method.stored_scales and is_matrix_product(layer)
            if sets_scale and weight is not None and _computes_scale(weight):
                raise _computed_scale(name, weight, self.method)
            if self.method.move_scales and inputs is not None and not inputs.computed and inputs.ready:
                raise QatkitError(
                    f"{self.method.name} changes the input range of layer '{name}', which is already calibrated",
                    advice="call apply_ptq before calibrate",
                )

    def folds(self, blocks: list[nn.Module]) -> list[Fold]:
        """Find the inputs whose scales the method can move."""
        if not self.method.move_scales:
            return []
        for block in blocks or [self.model]:
            if qat_layers(block) and not find_folds(block, self.uses):
                raise QatkitError(
                    f"{self.method.name} does not support {type(block).__name__} in {type(self.model).__name__}, "
                    f"whose layer order is unknown; supported blocks are {', '.join(BLOCKS)} and nn.Sequential of "
                    "Linear and "
                    "ReLU",
                    advice="use gptq",
                )
        return find_folds(self.model, self.uses)

    def _process(self, inside: list[QATLayer], folds: list[Fold], runs: Callable[[], Iterator[object]]) -> None:
        """Record the inputs of some layers, run with plain weights, then set the layers."""
        recorded = {layer: InputStatistics(self.method.second_moment) for layer in inside if is_matrix_product(layer)}
        with ExitStack() as stack:
            stack.enter_context(unquantized(inside, "weight_fake_quant"))
            for layer, statistics in recorded.items():
                stack.callback(layer.register_forward_pre_hook(_recorder(statistics), with_kwargs=True).remove)
            for _ in runs():
                pass
        for layer, statistics in recorded.items():
            if not statistics.finite:
                raise QatkitError(
                    f"{self.method.name}: the input of layer '{self.names[layer]}' is non-finite",
                    advice="check the data and the checkpoint",
                )
        for fold in folds:
            if any(consumer in recorded for consumer in fold.consumers):
                self._fold(fold, recorded)
        if not self.method.from_inputs:
            return
        for layer in inside:
            fake_quant = layer.weight_fake_quant
            if fake_quant is None or not fake_quant.spec.element.scaled:
                continue
            reason = self._reason(layer, recorded.get(layer))
            if reason:
                self.skipped[self.names[layer]] = reason
            else:
                self._set(layer, fake_quant, recorded.pop(layer).hessian)

    def _reason(self, layer: QATLayer, statistics: InputStatistics | None) -> str:
        """Return why a layer keeps its scale, or an empty string."""
        if statistics is None:
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                return "grouped convolution"
            return "embedding" if isinstance(layer, nn.Embedding) else type(layer).__name__.removeprefix("QAT")
        if self.uses[id(layer.weight)] > 1:
            return "shared weight"
        return "no input reached the layer" if statistics.rows == 0 else ""

    @torch.no_grad()
    def _set(self, layer: QATLayer, fake_quant: FakeQuantize, hessian: Tensor) -> None:
        matrix = layer.matrix
        self.undo.keep(layer.weight, *fake_quant.parameters(), *fake_quant.buffers())
        if fake_quant.spec.two_level and not fake_quant.spec.super_blocks:
            fake_quant.initialize(matrix)  # sets the scale of the tensor; super-blocks get theirs from the method
        weight, *qparams = implementation(self.method.from_inputs)(matrix.flatten(1), hessian, fake_quant.spec)
        layer.set_matrix(weight.view_as(matrix))
        fake_quant.set_qparams(*qparams)
        self.done.append(self.names[layer])

    def _fold(self, fold: Fold, recorded: dict[QATLayer, InputStatistics]) -> None:
        """Compute the scales of one input and move them into the layers around it."""
        readers = [consumer for consumer in fold.consumers if isinstance(consumer, QATLayer) and consumer in recorded]
        statistics = recorded[readers[0]]
        if statistics.rows == 0:
            return
        shared = SharedInput(readers, fold_matrices(fold), statistics)
        scales: Tensor | None = implementation(self.method.move_scales)(shared)
        if scales is None:
            return
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
            recorded[layer].rescale(scales)
            if not self.method.from_inputs:
                self.done.append(self.names[layer])


def _through(runs: list[Run], block: nn.Module, index: int) -> Iterator[object]:
    return (run.through(block, index) for run in runs)


def _recorder(statistics: InputStatistics) -> Callable[..., None]:
    def hook(layer: QATLayer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        record_inputs(layer, args[0] if args else next(iter(kwargs.values())), statistics)

    return hook
