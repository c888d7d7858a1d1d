"""Static activation ranges from a few batches: no gradients, isolated random numbers, one all-reduce, then frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.arithmetic import tensor_scale_of
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.prepare import fake_quantizers
from qatkit.quantization.ranges import RangeObserver, needs_histogram, static_qparams


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object] | None = None) -> list[str]:
    """Set the static activation scales of a prepared model from the ranges seen over `batches`.

    Runs in eval mode without gradients; modes and random number generators are put back. Weights are fake-quantized
    while activations are watched unrounded. In a process group the ranges of all ranks are joined with one all-reduce
    (and one for histograms, where a range method needs them).

    Args:
        model: A model from `prepare_qat`.
        batches: What `forward` takes; every rank may have its own.
        forward: Runs the model on one batch; `model(batch)` by default.

    Returns:
        Names of the fake quantizers that were set.

    Raises:
        QatkitError: nothing is prepared, no batches, a layer that the batches never reach, or activations that are not
            finite. The model's scales are then as they were.

    Example:
        >>> import torch
        >>> from qatkit import QuantSpec, calibrate, prepare_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = prepare_qat(model, activation=QuantSpec(symmetric=False, strategy="tensor"))
        >>> calibrate(model, [torch.randn(4, 8)])
        ['0.input_fake_quant']
    """
    quantizers = fake_quantizers(model)
    if not quantizers:
        raise QatkitError("calibrate: the model has no fake-quantized layer; call prepare_qat before")
    watched = [(name, fq) for name, fq in quantizers if fq.role == "activation" and _is_static(fq)]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    count = 0
    try:
        for _, fake_quant in watched:
            fake_quant.observer = RangeObserver(needs_histogram(fake_quant.spec) and not fake_quant.dynamic)
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            for batch in batches:
                (forward or model)(batch)
                count += 1
        observers = [fake_quant.observer for _, fake_quant in watched]
    finally:
        for _, fake_quant in watched:
            fake_quant.observer = None
        for module, mode in modes:
            module.training = mode
    if not watched:
        return []
    _set_scales(watched, [observer for observer in observers if observer is not None], count)
    return [name for name, _ in watched]


def _is_static(fake_quant: FakeQuantize) -> bool:
    return not fake_quant.computed or fake_quant.tensor_scale is not None


def _set_scales(watched: list[tuple[str, FakeQuantize]], observers: list[RangeObserver], count: int) -> None:
    kept = watched[0][1].scale if watched[0][1].scale is not None else watched[0][1].tensor_scale
    assert kept is not None
    device = kept.device
    # [-low, high] per layer and the number of batches: one buffer, one MAX. A rank that saw nothing has -inf; NaN
    # becomes inf, because a MAX over NaN may drop it, and one rank raising alone would leave the others waiting.
    unseen = torch.full((2,), -torch.inf)
    rows = [
        unseen
        if o.low is None or o.high is None
        else torch.cat([-o.low, o.high]).cpu().nan_to_num(torch.inf, torch.inf, -torch.inf)
        for o in observers
    ]
    joined = torch.stack([*rows, torch.full((2,), float(count))]).to(device)
    # sums over the calls, and histograms where a range method needs them: one buffer, one SUM
    sums = torch.cat([torch.cat([o.sums.nan_to_num(), *_counts(o)]) for o in observers]).to(device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined, op=dist.ReduceOp.MAX)
        if any(fake_quant.spec.observer != "minmax" for _, fake_quant in watched):
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    *ranges, batches = joined.cpu().unbind()
    if batches[0] == 0:
        raise QatkitError("calibration: the data gave no batch; static activation scales need at least one")
    for (name, _), seen in zip(watched, ranges, strict=True):
        layer = name.rpartition(".")[0]
        if seen.eq(torch.inf).any():
            raise QatkitError(f"calibration: the input of layer '{layer}' holds NaN or infinite values")
        if seen.eq(-torch.inf).any():
            raise QatkitError(
                f"calibration: layer '{layer}' was never run, so its input has no range; exclude it from quantization"
            )
    parts = torch.split(sums.cpu(), [3 + sum(len(c) for c in _counts(o)) for o in observers])
    found: list[tuple[torch.Tensor, ...]] = []
    for (_, fake_quant), observer, seen, part in zip(watched, observers, ranges, parts, strict=True):
        low, high = -seen[:1], seen[1:]
        if fake_quant.tensor_scale is not None:
            found.append((tensor_scale_of(torch.maximum(-low, high), fake_quant.spec),))
            continue
        mean = (part[:2] / part[2].clamp(min=1)).float()
        counts = None if observer.counts is None else part[3:].long()
        found.append(static_qparams(low, high, mean, counts, fake_quant.spec))
    for (_, fake_quant), numbers in zip(watched, found, strict=True):  # an interrupt in a search leaves all as it was
        if len(numbers) == 1:
            fake_quant.set_tensor_scale(*numbers)
        else:
            fake_quant.set_qparams(*numbers)


def _counts(observer: RangeObserver) -> list[torch.Tensor]:
    return [] if observer.counts is None else [observer.counts.double()]
