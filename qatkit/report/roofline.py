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
    served = {phase: [layer for layer in layers if layer.flops] for phase, layers in phases.items()}
    served.pop("training", None)
    values = [layer.intensity(dtype) for layers in served.values() for layer in layers]
    low, high = min([*values, ridge]) / 2, max([*values, ridge]) * 2
    with canvas(720, 380) as (figure, (axes,)):
        ends = [low, ridge, high]
        axes.plot(ends, [min(end * bandwidth, peak) for end in ends], color=INK)
        for (phase, layers), color in zip(served.items(), SERIES, strict=False):
            times = [seconds(layer, device, dtype) for layer in layers]
            axes.scatter(
                [layer.intensity(dtype) for layer in layers],
                [min(layer.intensity(dtype) * bandwidth, peak) for layer in layers],
                s=[20 + 400 * time / sum(times) for time in times], color=color, edgecolor=CARD, label=phase,
                alpha=0.8, zorder=3,
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
