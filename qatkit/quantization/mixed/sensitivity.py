"""Sensitivity: the loss increase if only one layer group is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from glob import escape

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.quantization.calibration import calibrate
from qatkit.quantization.mixed.records import Group, Option, Sensitivity, stored_bytes
from qatkit.quantization.prepare import SIBLINGS, fake_quantizers, prepare_qat, quantized_weights, strip_qat
from qatkit.quantization.selection import select
from qatkit.schemes import Scheme
from qatkit.spec import QuantSpec

Loss = Callable[[nn.Module], float]


def measure_sensitivity(
    model: nn.Module,
    candidates: Mapping[str, Scheme],
    loss: Loss,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Sensitivity:
    """Measure the loss with each layer group quantized to each candidate format, without training.

    Weight scales come from the observers of the specs; static activation scales are calibrated on the data of `loss`.
    The model runs in eval mode, without gradients and with the same random state every time. Layers and weights are
    restored exactly afterwards, even after an error.

    Args:
        model: Any module with plain layers.
        candidates: Formats by name; each has a weight spec.
        loss: Runs the model on calibration data and returns the mean loss. It is called once for the plain model, once
            for every group and candidate, and once more if static scales are calibrated.
        include: Globs over layer names, as in `prepare_qat`.
        exclude: Globs over names of layers to leave unquantized.

    Returns:
        The measurement of all groups. Layers that must have the same format form a group: layers with the same input
        (q/k/v, gate/up) or with a shared weight. Candidates that cannot be applied to a group (for example, if the
        group size does not divide the inputs) are omitted.

    Raises:
        QatkitError: No candidate can be applied to a group, the loss is non-finite, `loss` never runs a layer, or the
            model is already quantized.

    Example:
        >>> import torch
        >>> from qatkit import QuantSpec, Scheme
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)), torch.randn(16, 8)
        >>> candidates = {f"int{bits}": Scheme(QuantSpec(num_bits=bits)) for bits in (2, 8)}
        >>> sensitivity = measure_sensitivity(model, candidates, lambda model: model(x).square().mean().item())
        >>> [(group.name, group.options["int2"].bytes) for group in sensitivity.groups]
        [('0', 48), ('1', 6)]
    """
    if not candidates:
        raise QatkitError(
            "no candidates were passed", key="candidates", advice="pass {'int8': Scheme(QuantSpec(num_bits=8))}"
        )
    for name, scheme in candidates.items():
        if scheme.weight is None:
            raise QatkitError(
                f"'{name}' does not quantize the weight, so it saves no memory", key="candidates",
                advice="add a weight spec",
            )  # fmt: skip
    if quantized := fake_quantizers(model):
        layer = quantized[0][0].rpartition(".")[0]
        raise QatkitError(f"layer '{layer}' is already fake-quantized", advice="call strip_qat(model) first")
    groups = layer_groups(model, include, exclude)
    left_out: list[str] = []
    fitting = [_fitting(model, layers, candidates, left_out) for layers in groups]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        plain = _evaluate(model, loss)
        if not math.isfinite(plain):
            raise QatkitError(
                f"the plain model has a loss of {plain}", key="loss", advice="use a loss that is finite for this model"
            )
        measured = [
            _measure(model, layers, fits, loss, plain, left_out) for layers, fits in zip(groups, fitting, strict=True)
        ]
    finally:
        for module, mode in modes:
            module.training = mode
    taken = {name for layers in groups for name in layers}
    return Sensitivity(
        loss=plain,
        candidates=dict(candidates),
        groups=tuple(measured),
        others=tuple(
            name
            for name, module in model.named_modules()
            if name not in taken and next(module.parameters(recurse=False), None) is not None
        ),
        left_out=tuple(left_out),
    )


def layer_groups(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[list[str]]:
    """Group the layers that need the same format: layers with the same input or a shared weight.

    Runtimes merge q/k/v and gate/up into one matrix product, and a tied weight can have only one format.
    """
    chosen = select(
        model, QuantSpec(strategy="channel"), include=include, exclude=exclude
    )  # per channel, which fits every layer
    root = {name: name for name in chosen}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    first: dict[object, str] = {}
    for name in chosen:
        parent, _, own = name.rpartition(".")
        keys: list[object] = [(parent, family) for family in SIBLINGS if own in family]
        if (weight := model.get_submodule(name)._parameters.get("weight")) is not None:
            keys.append(id(weight))
        for key in keys:
            root[find(name)] = find(first.setdefault(key, name))
    groups: dict[str, list[str]] = {}
    for name in chosen:
        groups.setdefault(find(name), []).append(name)
    return list(groups.values())


def _fitting(
    model: nn.Module, layers: Sequence[str], candidates: Mapping[str, Scheme], left_out: list[str]
) -> dict[str, Scheme]:
    fits, reasons = {}, []
    for name, scheme in candidates.items():
        try:
            select(model, layers={escape(layer): scheme for layer in layers})
            fits[name] = scheme
        except QatkitError as error:
            reasons.append(f"{name} is omitted: {error}")
    if not fits:
        raise QatkitError(
            f"no candidate fits layers {list(layers)}:\n  " + "\n  ".join(reasons), key="candidates",
            advice="exclude the layers, or add a candidate that fits",
        )  # fmt: skip
    left_out += reasons
    return fits


def _measure(
    model: nn.Module, layers: Sequence[str], fits: Mapping[str, Scheme], loss: Loss, plain: float, left_out: list[str]
) -> Group:
    options: dict[str, Option] = {}
    weights = 0
    for name, scheme in fits.items():
        try:
            prepare_qat(model, layers={escape(layer): scheme for layer in layers})
            used = fake_quantizers(model)
            if not all(fake_quant.ready for _, fake_quant in used):
                calibrate(model, [None], lambda _: loss(model))
            value = _evaluate(model, loss)
            if idle := [quantizer for quantizer, fake_quant in used if not fake_quant.ran]:
                raise QatkitError(
                    f"computing the loss never runs layer '{idle[0].rpartition('.')[0]}', so its sensitivity cannot be "
                    "measured",
                    advice="exclude the layer",
                )
            # tied weights share their quantizer and are stored once
            stored = {id(fake_quant): (weight, fake_quant.spec) for _, weight, fake_quant in quantized_weights(model)}
        finally:
            strip_qat(model)
        weights = sum(weight.numel() for weight, _ in stored.values())
        if math.isfinite(value):
            size = sum(stored_bytes(weight.shape, spec) for weight, spec in stored.values())
            options[name] = Option(bytes=size, increase=value - plain)
        else:
            left_out.append(f"{name} is omitted: the loss is {value} when it is applied to {list(layers)}")
    if not options:
        raise QatkitError(
            f"the loss is non-finite with every candidate for layers {list(layers)}", advice="exclude the layers"
        )
    return Group(layers=tuple(layers), weights=weights, options=options)


def _evaluate(model: nn.Module, loss: Loss) -> float:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # every call starts from the same random numbers
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        return float(loss(model))
