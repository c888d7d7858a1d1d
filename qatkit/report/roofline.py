"""Draw a device's roofline with the layers of a model as points."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from qatkit.advise.devices import Device
from qatkit.advise.roofline import LayerCost, rate_of, seconds


def picture(phases: Mapping[str, Sequence[LayerCost]], device: Device, dtype: str) -> str:
    """Return a standalone SVG: operations per byte against the rate that the roofline allows, on logarithmic axes.

    Each layer with products is a point on the roof, whose area is its part of the phase's time. Training is left out,
    because its layers have the same intensities as those of the forward pass.

    Args:
        phases: Layers by phase.
        device: The device.
        dtype: The dtype of the uncompressed model.
    """
    from qatkit.report.svg import CARD, INK, MUTED, SERIES, canvas

    peak, bandwidth = rate_of(device, dtype), device.bandwidth / 1e3  # TFLOP/s, TB/s
    ridge = peak / bandwidth
    drawn = {phase: points(layers, device, dtype) for phase, layers in phases.items() if phase != "training"}
    values = [x for found in drawn.values() for x, _, _ in found]
    low, high = min([*values, ridge]) / 2, max([*values, ridge]) * 2
    with canvas(720, 380) as (figure, (axes,)):
        ends = [low, ridge, high]
        axes.plot(ends, [min(end * bandwidth, peak) for end in ends], color=INK)
        for (phase, found), color in zip(drawn.items(), SERIES, strict=False):
            axes.scatter(
                [x for x, _, _ in found], [y for _, y, _ in found], s=[20 + 400 * part for _, _, part in found],
                color=color, edgecolor=CARD, label=phase, alpha=0.8, zorder=3,
            )  # fmt: skip
        axes.axvline(ridge, color=MUTED, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_xlabel(f"FLOP/byte; left of {ridge:.3g}, layers are memory-bound", color=MUTED)
        axes.set_ylabel(f"TFLOP/s in {dtype} on {device.name}", color=MUTED)
        axes.legend(loc="lower right")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor=CARD, metadata={"Date": None})
    return buffer.getvalue()


def points(layers: Sequence[LayerCost], device: Device, dtype: str) -> list[tuple[float, float, float]]:
    """Return the operations per byte, the attainable rate in TFLOP/s and the part of the time of layers with products.

    Args:
        layers: The layers of one phase.
        device: The device.
        dtype: The dtype of the uncompressed model.

    Example:
        >>> from qatkit.advise.devices import DEVICES
        >>> vector = LayerCost("head", "Linear", 10**6, 10**6, 2 * 10**6, 2000)  # a matrix times a vector
        >>> [(x, y, part)] = points([vector], DEVICES["a100"], "bf16")
        >>> round(x, 2), round(y, 2), part
        (1.0, 2.03, 1.0)
    """
    peak, bandwidth = rate_of(device, dtype), device.bandwidth / 1e3
    products = [layer for layer in layers if layer.flops]
    times = [seconds(layer, device, dtype) for layer in products]
    return [
        (layer.intensity(dtype), min(layer.intensity(dtype) * bandwidth, peak), time / sum(times))
        for layer, time in zip(products, times, strict=True)
    ]
