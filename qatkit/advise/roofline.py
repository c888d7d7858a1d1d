"""The roofline model: whether arithmetic or memory limits the speed of each layer, and the effect of compression.

A layer takes the longer of two times: its operations at the device's peak rate, and its bytes at the memory bandwidth
(Williams et al., 2009, https://doi.org/10.1145/1498765.1498785). This is a lower bound; caches, launches and
temporary values are not included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qatkit.advise.devices import Device
from qatkit.errors import QatkitError

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5}


@dataclass(frozen=True)
class LayerCost:
    """Arithmetic and data of one layer in one call of the model."""

    name: str
    kind: str
    weights: int
    """Number of parameters of the layer itself; tied parameters are counted in the first layer that has them."""
    read: int
    """Number of parameters that a call reads, including those of all experts, although tokens may need only some."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    activations: int
    """Number of elements of the layer's inputs and outputs."""
    stored: int = 0
    """Number of other elements that a call reads, such as the KV cache."""
    between_activations: bool = False
    """Whether the layer multiplies activations by each other, as in attention, so that compressing weights does not
    affect it.
    """

    def bytes(self, weight_bits: float, dtype: str) -> float:
        """Number of bytes moved: weights in `weight_bits` bits each, everything else in `dtype`."""
        return self.read * weight_bits / 8 + (self.activations + self.stored) * BYTES[dtype]

    def intensity(self, dtype: str) -> float:
        """Operations per byte, with weights in `dtype`."""
        moved = self.bytes(8 * BYTES[dtype], dtype)
        return self.flops / moved if moved else 0.0


@dataclass(frozen=True)
class Technique:
    """The effect of a compression technique on the roofline."""

    name: str
    weight_bits: float | None = None
    """Bits per weight; None keeps those of the base dtype."""
    dtype: str | None = None
    """The dtype of both operands; None keeps the base dtype."""
    kept: float = 1.0
    """Fraction of weights and operations that remains."""
    sparse: bool = False
    """Whether weights are 2:4 sparse: half of them are stored, with two bits of position each, and the device's sparse
    rates apply.
    """


TECHNIQUES = (
    Technique("W8A16", weight_bits=8),
    Technique("W4A16", weight_bits=4.125),  # one 16-bit scale per 128 weights
    Technique("W8A8", weight_bits=8, dtype="int8"),
    Technique("FP8", weight_bits=8, dtype="fp8"),
    Technique("2:4", sparse=True),
    Technique("half of the neurons", kept=0.5),
)


def layer_costs(model: nn.Module, call: Callable[[], object]) -> list[LayerCost]:
    """Count the arithmetic and the data of each layer in one call.

    Args:
        model: Any model, preferably on the meta device, because some operators are counted only there.
        call: Runs the model once.

    Returns:
        Layers in the order of their first call, without those that have neither parameters nor matrix products.

    Example:
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> (cost,) = layer_costs(layer, lambda: layer(torch.zeros(3, 4)))
        >>> cost.kind, cost.weights, cost.flops, cost.activations
        ('Linear', 8, 48, 18)
    """
    found: dict[str, LayerCost] = {}
    stack: list[list[int]] = []
    names = {module: name for name, module in model.named_modules()}
    seen: set[int] = set()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append([int(counter.get_total_flops()), 0])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, inside = stack.pop()
        total = int(counter.get_total_flops()) - before
        if stack:
            stack[-1][1] += total
        own = list(module.parameters(recurse=False))
        weights = sum(weight.numel() for weight in own if id(weight) not in seen)
        # an embedding reads the rows of its tokens; tied weights count once, but are read by every layer
        gathered = isinstance(module, nn.Embedding)
        read = output.numel() if gathered else sum(weight.numel() for weight in own)
        flops = total - inside
        seen.update(map(id, own))
        name = names[module]
        if weights or flops or name in found:
            leaves = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            moved = sum(leaf.numel() for leaf in leaves)
            earlier = found.get(name, LayerCost(name, type(module).__name__, 0, 0, 0, 0))
            found[name] = replace(
                earlier,
                weights=earlier.weights + weights,
                read=earlier.read + read,
                flops=earlier.flops + flops,
                activations=earlier.activations + moved,
                between_activations=flops > 0 and all(weight.dim() < 2 for weight in own),
            )

    handles = [
        handle
        for module in names
        for handle in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
    try:
        # the counter does not know the fused attention kernel on the CPU, but it knows the products of the math kernel
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    for module, name in names.items():  # such as the projection that attention calls as a function
        if left := [weight for weight in module.parameters(recurse=False) if id(weight) not in seen]:
            seen.update(map(id, left))
            while name and name not in found:
                name = name.rpartition(".")[0]
            count = sum(weight.numel() for weight in left)
            layer = found.get(name, LayerCost(name, type(model).__name__, 0, 0, 0, 0))
            found[name] = replace(
                layer, weights=layer.weights + count, read=layer.read + count, between_activations=False
            )
    return list(found.values())


def intensity_of(layers: Sequence[LayerCost], dtype: str) -> float:
    """Return the operations per byte of all layers together, with weights in `dtype`."""
    moved = sum(layer.bytes(8 * BYTES[dtype], dtype) for layer in layers)
    return sum(layer.flops for layer in layers) / moved if moved else 0.0


def training(layers: Sequence[LayerCost]) -> list[LayerCost]:
    """Return the cost of a training step without its optimizer.

    The gradients of inputs and weights are two more products, with the same operations and bytes as the forward pass.
    """
    return [
        replace(layer, read=3 * layer.read, flops=3 * layer.flops, activations=3 * layer.activations)
        for layer in layers
    ]


def seconds(layer: LayerCost, device: Device, dtype: str, technique: Technique = Technique("none")) -> float:
    """Return the time of a layer on the roofline.

    Raises:
        QatkitError: the device has no rate for the dtype.
    """
    if layer.between_activations:
        technique = Technique("none")
    operands = technique.dtype or dtype
    rate = rate_of(device, operands)
    bits = technique.weight_bits or 8 * BYTES[dtype]
    if technique.sparse:
        bits, rate = bits / 2 + 1, rate * (1 if operands == "fp32" else device.sparse)
    kept = technique.kept
    moved = kept * replace(layer, stored=0).bytes(bits, operands) + layer.stored * BYTES[dtype]
    return device.operator + max(kept * layer.flops / (rate * 1e12), moved / (device.bandwidth * 1e9))


def call_seconds(
    layers: Sequence[LayerCost], device: Device, dtype: str, technique: Technique = Technique("none")
) -> float:
    """Return the time of a call of all layers on the roofline of a device, with what it measured of its overheads.

    Raises:
        QatkitError: the device has no rate for the dtype.

    Example:
        >>> from qatkit.advise.devices import DEVICES
        >>> head = LayerCost("head", "Linear", 10**6, 10**6, 2 * 10**6, 2000)
        >>> f"{call_seconds([head, head], DEVICES['a100'], 'bf16') * 1e6:.2f} µs"
        '1.97 µs'
    """
    near = in_caches(device, layers, dtype, technique)
    return device.call + sum(seconds(layer, near, dtype, technique) for layer in layers)


def in_caches(
    device: Device, layers: Sequence[LayerCost], dtype: str, technique: Technique = Technique("none")
) -> Device:
    """Return the device with the bandwidth of the smallest cache that holds the weights of all layers.

    A call finds them there if the previous one has read them. A device whose caches were not measured is returned as
    it is.
    """
    bits = technique.weight_bits or 8 * BYTES[dtype]
    held = technique.kept * sum(layer.read for layer in layers) * (bits / 2 + 1 if technique.sparse else bits) / 8
    return replace(
        device, bandwidth=next((rate for size, rate in device.caches if held <= size), device.bandwidth), caches=()
    )


def rate_of(device: Device, dtype: str) -> float:
    """Return the peak rate of a device in TFLOP/s.

    Raises:
        QatkitError: the device has no rate for the dtype.
    """
    if dtype not in device.rates:
        raise QatkitError(
            f"'{device.name}' has no rate for {dtype}", key="device", advice=f"use one of: {', '.join(device.rates)}"
        )
    return device.rates[dtype]


def supports(device: Device, dtype: str, technique: Technique) -> bool:
    """Whether a device computes with a technique, and has a rate for it."""
    return (technique.dtype or dtype) in device.rates and not (technique.sparse and device.sparse == 1)


def bound_of(layer: LayerCost, device: Device, dtype: str) -> str:
    """Return "compute" or "memory", whichever takes longer."""
    return "compute" if layer.intensity(dtype) >= rate_of(device, dtype) * 1e3 / device.bandwidth else "memory"
