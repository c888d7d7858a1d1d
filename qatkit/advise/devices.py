"""Peak rates and memory bandwidth of devices, from the manufacturers' documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qatkit.common.tables import Table

Processor = Literal["gpu", "x86", "x86-vnni", "arm"]
"""An NVIDIA GPU, an x86 CPU without or with VNNI (8-bit products that cannot overflow), or an ARM CPU with its GPU."""
GPU: Processor = "gpu"
X86: Processor = "x86"
VNNI: Processor = "x86-vnni"
ARM: Processor = "arm"


@dataclass(frozen=True)
class Device:
    """A processor with its memory; rates are peak rates without sparsity."""

    name: str
    processor: Processor | None
    """Determines the formats that runtimes compute; None if it is unknown, so that no format is known to work."""
    memory: float
    """GB (1e9 bytes)."""
    bandwidth: float
    """GB/s."""
    rates: Mapping[str, float]
    """Peak rate in TFLOP/s (TOP/s for int8), by the dtype of both operands: "fp32", "bf16", "fp8", "int8", "fp4"."""
    source: str
    """The source of the numbers, or how they are derived."""
    sparse: float = 1.0
    """Speedup from 2:4 sparsity for 16-bit and smaller dtypes; 1 if the device does not support it."""
    caches: tuple[tuple[int, float], ...] = ()
    """Bytes of data and the GB/s at which repeated calls read them, smallest first; empty if it is not measured."""
    call: float = 0.0
    """Seconds per call of a model that are neither arithmetic nor data; 0 if it is not measured."""
    operator: float = 0.0
    """The same per operator."""

    @property
    def fastest(self) -> str:
        """The dtype of an uncompressed model: the faster of fp32 and bf16."""
        return max((name for name in ("fp32", "bf16") if name in self.rates), key=self.rates.__getitem__)


_TENSOR_CORES = 2.0

DEVICES = Table(
    "device",
    [
        Device(
            "a100", GPU, 80, 2039, {"fp32": 19.5, "bf16": 312, "int8": 624}, "NVIDIA A100 80GB SXM data sheet",
            _TENSOR_CORES,
        ),
        Device(
            "h100", GPU, 80, 3350, {"fp32": 67, "bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            "NVIDIA H100 SXM data sheet, half of the sparse rates", _TENSOR_CORES,
        ),
        Device(
            "h200", GPU, 141, 4800, {"fp32": 67, "bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            "NVIDIA H200 SXM data sheet, half of the sparse rates", _TENSOR_CORES,
        ),
        Device(
            "b200", GPU, 180, 8000, {"fp32": 75, "bf16": 2250, "fp8": 4500, "int8": 4500, "fp4": 9000},
            "NVIDIA DGX B200 data sheet, per GPU, half of the sparse rates", _TENSOR_CORES,
        ),
        Device(
            "l4", GPU, 24, 300, {"fp32": 30.3, "bf16": 121, "fp8": 242.5, "int8": 242.5},
            "NVIDIA L4 data sheet, half of the sparse rates", _TENSOR_CORES,
        ),
        Device(
            "l40s", GPU, 48, 864, {"fp32": 91.6, "bf16": 362, "fp8": 733, "int8": 733}, "NVIDIA L40S data sheet",
            _TENSOR_CORES,
        ),
        Device(
            "rtx4090", GPU, 24, 1008, {"fp32": 82.6, "bf16": 165.2, "fp8": 330.3, "int8": 660.6},
            "NVIDIA Ada architecture white paper, with float32 accumulation", _TENSOR_CORES,
        ),
        Device(
            "rtx5090", GPU, 32, 1792, {"fp32": 104.8, "bf16": 209.5, "fp8": 419, "int8": 838, "fp4": 1676},
            "NVIDIA RTX Blackwell architecture white paper, with float32 accumulation", _TENSOR_CORES,
        ),
        Device("m1-max", ARM, 64, 400, {"fp32": 10.4}, "Apple's announcement of the M1 Max, GPU"),
        Device("m2-ultra", ARM, 192, 800, {"fp32": 27.2}, "Apple's announcement of the M2 Ultra, GPU"),
        Device(
            "xeon-8480", VNNI, 512, 307.2, {"fp32": 7.2, "bf16": 114.7, "int8": 229.4},
            "Intel Xeon Platinum 8480+: 56 cores at 2.0 GHz with 64 (AVX-512), 1024 and 2048 (AMX) operations per "
            "cycle; 8 channels of DDR5-4800",
        ),
        Device(
            "epyc-9654", VNNI, 768, 460.8, {"fp32": 7.4, "bf16": 14.7, "int8": 29.5},
            "AMD EPYC 9654: 96 cores at 2.4 GHz with 32, 64 and 128 operations per cycle; 12 channels of DDR5-4800",
        ),
        Device(
            "jetson-orin", GPU, 64, 204.8, {"fp32": 5.3, "bf16": 42.5, "int8": 85},
            "NVIDIA Jetson AGX Orin technical brief, GPU, half of the sparse rates", _TENSOR_CORES,
        ),
        Device(
            "raspberry-pi-5", ARM, 8, 17.1, {"fp32": 0.154, "int8": 0.614},
            "Raspberry Pi 5: 4 Cortex-A76 cores at 2.4 GHz with 16 and 64 operations per cycle; 32-bit LPDDR4X-4267",
        ),
    ],
)  # fmt: skip
