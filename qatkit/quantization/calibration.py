"""Calibration: set static activation scales from a few batches, and freeze them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.observers import OBSERVERS
from qatkit.quantization.prepare import fake_quantizers
from qatkit.quantization.ranges import RangeObserver, Statistics, static_qparams
from qatkit.quantization.scales import tensor_scale_of


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object] | None = None) -> list[str]:
    """Set the static activation scales of a prepared model from the activations of `batches`.

    The model runs in eval mode without gradients; train/eval modes and random states are restored afterwards. Weights
    are fake-quantized; activations are recorded unquantized. In a process group, the ranges of all ranks are combined
    by one all-reduce, or by two if an observer needs averages or histograms.

    Args:
        model: A model prepared by `prepare_qat`.
        batches: Batches to pass to `forward`; each rank may have different ones.
        forward: Runs the model on one batch. The default is `model(batch)`.

    Returns:
        Names of the fake quantizers whose scales were set.

    Raises:
        QatkitError: The model is not prepared, there are no batches, a layer never runs, or activations are non-finite.
            In that case, the model's scales are unchanged.

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
        raise QatkitError("the model has no fake-quantized layer", key="model", advice="call prepare_qat first")
    calibrated = [(name, fq) for name, fq in quantizers if fq.role == "activation" and _is_static(fq)]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    count = 0
    try:
        for _, fake_quant in calibrated:
            fake_quant.observer = RangeObserver(
                OBSERVERS[fake_quant.spec.observer].histogram and not fake_quant.dynamic
            )
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            for batch in batches:
                (forward or model)(batch)
                count += 1
        observers = [fake_quant.observer for _, fake_quant in calibrated]
    finally:
        for _, fake_quant in calibrated:
            fake_quant.observer = None
        for module, mode in modes:
            module.training = mode
    if not calibrated:
        return []
    _set_scales(calibrated, [observer for observer in observers if observer is not None], count)
    return [name for name, _ in calibrated]


def _is_static(fake_quant: FakeQuantize) -> bool:
    return not fake_quant.computed or fake_quant.outer_scale is not None


def _set_scales(calibrated: list[tuple[str, FakeQuantize]], observers: list[RangeObserver], count: int) -> None:
    kept = calibrated[0][1].scale if calibrated[0][1].scale is not None else calibrated[0][1].outer_scale
    assert kept is not None
    device = kept.device
    # [-low, high] per layer and the number of batches, in one buffer for one MAX. A rank without a value has -inf. NaN
    # becomes inf: a MAX may drop NaN, and if only one rank raised an error the others would wait forever.
    unseen = torch.full((2,), -torch.inf, dtype=torch.float32)
    rows = [
        unseen
        if o.low is None or o.high is None
        else torch.cat([-o.low, o.high]).cpu().nan_to_num(torch.inf, torch.inf, -torch.inf)
        for o in observers
    ]
    joined = torch.stack([*rows, torch.full((2,), float(count), dtype=torch.float32)]).to(device)
    # sums over the calls, and the histograms of observers that need one, in one buffer for one SUM
    sums = torch.cat([torch.cat([o.sums.nan_to_num(), *_counts(o)]) for o in observers]).to(device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(joined, op=dist.ReduceOp.MAX)
        if any(_needs_sums(fake_quant) for _, fake_quant in calibrated):
            dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    *ranges, batches = joined.cpu().unbind()
    if batches[0] == 0:
        raise QatkitError(
            "calibration received no batches, but static activation scales need at least one", key="batches",
            advice="pass a data loader that is not empty",
        )  # fmt: skip
    for (name, _), ends in zip(calibrated, ranges, strict=True):
        layer = name.rpartition(".")[0]
        if ends.eq(torch.inf).any():
            raise QatkitError(
                f"the input of layer '{layer}' has non-finite values during calibration",
                advice="check the data and the checkpoint",
            )
        if ends.eq(-torch.inf).any():
            raise QatkitError(
                f"layer '{layer}' never ran during calibration, so its input has no range",
                advice="exclude the layer from quantization",
            )
    parts = torch.split(sums.cpu(), [3 + sum(len(c) for c in _counts(o)) for o in observers])
    chosen: list[tuple[torch.Tensor, ...]] = []
    for (_, fake_quant), observer, ends, part in zip(calibrated, observers, ranges, parts, strict=True):
        low, high = -ends[:1], ends[1:]
        if fake_quant.outer_scale is not None:
            chosen.append((tensor_scale_of(torch.maximum(-low, high), fake_quant.spec),))
            continue
        mean = (part[:2] / part[2].clamp(min=1)).float()
        counts = None if observer.counts is None else part[3:].long()
        chosen.append(static_qparams(Statistics(low, high, mean, counts), fake_quant.spec))
    # the model is changed only from here on: an interrupt during a search leaves every scale unchanged
    for (_, fake_quant), qparams in zip(calibrated, chosen, strict=True):
        if len(qparams) == 1:
            fake_quant.set_outer_scale(*qparams)
        else:
            fake_quant.set_qparams(*qparams)


def _needs_sums(fake_quant: FakeQuantize) -> bool:
    observer = OBSERVERS[fake_quant.spec.observer]
    return observer.histogram or observer.averages


def _counts(observer: RangeObserver) -> list[torch.Tensor]:
    return [] if observer.counts is None else [observer.counts.double()]
