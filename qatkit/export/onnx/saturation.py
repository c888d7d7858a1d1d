"""Check whether a processor's 8-bit kernels saturate for an ONNX file.

On x86 processors without VNNI, ONNX Runtime adds pairs of products of unsigned inputs and signed weights in 16 bits. If
the magnitudes of a pair of weights add up to more than 128, the sum may overflow (255 * 129 > 32767) and is silently
clipped. 7-bit weights never overflow, and unsigned weights use exact kernels.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.export.output_tensors import distances

_LARGEST_PAIR = 32767 // 255
EXACT_OPTION = "the session option session.x64quantprecision=1"
"""ONNX Runtime's option for exact kernels, as phrased in an error."""


def saturates() -> bool:
    """Whether 8-bit products may saturate on this processor: x86 without VNNI, or unknown."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def layers_at_risk(codes: dict[str, np.ndarray[Any, Any]]) -> list[str]:
    """Return the names of the layers for which 8-bit kernels may saturate.

    Args:
        codes: Weight codes ``[out, ...]`` of layers with quantized inputs, by layer name.

    Example:
        >>> layers_at_risk({"a": np.array([[64, -64, 3]], np.int8), "b": np.array([[127, 2, 3]], np.int8)})
        ['b']
    """
    found = []
    for name, values in codes.items():
        if values.dtype == np.int8 and values.size:
            sizes = np.sort(np.abs(values.astype(np.int16)).reshape(len(values), -1))[:, -2:].sum(axis=1)
            if sizes.max() > _LARGEST_PAIR:
                found.append(name)
    return found


class SaturationCheck:
    """A file loaded in a default session and in a session with exact kernels; every call runs both.

    Args:
        runtime: The default session.
        exact: The session with exact kernels.
        layers: Names of the layers whose kernels may saturate.
        option: How to open a session with exact kernels.
    """

    def __init__(
        self, runtime: Callable[..., Any], exact: Callable[..., Any], layers: list[str], option: str = EXACT_OPTION
    ) -> None:
        self._runtime, self._exact, self._layers, self._option = runtime, exact, layers, option
        self._largest = 0.0

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """The outputs of the default session."""
        outputs = self._runtime(*args, **kwargs)
        with torch.no_grad():
            apart = distances(self._exact(*args, **kwargs), outputs)
            self._largest = max([self._largest, *(largest for _, largest in apart.values())])
        return outputs

    def failures(self) -> list[str]:
        """Return descriptions of the differences and their fix; empty if no call has saturated."""
        if self._largest < 1e-5:
            return []
        named = ", ".join(f"'{name}'" for name in self._layers[:3])
        more = f" and {len(self._layers) - 3} more" if len(self._layers) > 3 else ""
        return [
            "outputs: this processor's 8-bit kernels saturate for the signed 8-bit weights of "
            f"{named}{more} (x86 without VNNI): a default session differs from exact kernels by up to "
            f"{self._largest:.3g}. Train with weight: {{num_bits: 7}}, which cannot saturate; export again, which "
            f"writes 8-bit weights as unsigned and is exact but slower; or serve the file with {self._option}"
        ]
