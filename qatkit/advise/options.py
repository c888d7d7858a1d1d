"""The table of `qatkit advise`: formats by runtime, with their effect on the roofline and the evidence for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from qatkit.advise.devices import ARM, GPU, VNNI, X86, Device, Processor
from qatkit.advise.families import Family
from qatkit.advise.roofline import Technique
from qatkit.common.tables import Table

RUNTIMES = ("vllm", "llamacpp", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Option:
    """A compressed format in a runtime."""

    name: str
    runtime: str
    export: str
    """The export format."""
    technique: Technique
    families: tuple[Family, ...]
    """The families of models that it is for."""
    processors: tuple[Processor, ...]
    """The processors on which the runtime computes it."""
    evidence: str
    """The nearest format in the benchmarks."""
    quantize: Mapping[str, Any] = field(default_factory=dict)
    """The ``quantize`` block without a method."""
    gptq: bool = False
    """Whether GPTQ is the method without training; otherwise, scales are calibrated."""
    needs: str = ""
    """The dtype whose rate the device must have."""


_ANY: tuple[Processor, ...] = (GPU, X86, VNNI, ARM)
_STATIC: tuple[Family, ...] = ("convolutional", "mlp", "unknown")


def _vllm(name: str, bits: float, evidence: str, **fields: Any) -> Option:
    technique = Technique(name, weight_bits=bits, dtype=fields.get("needs") or None)
    quantize = {"scheme": name}
    return Option(name, "vllm", "compressed_tensors", technique, ("language",), (GPU,), evidence, quantize, **fields)


def _gguf(name: str, bits: float, evidence: str, **fields: Any) -> Option:
    technique = Technique(name, weight_bits=bits)
    return Option(name, "llamacpp", "gguf", technique, ("language",), _ANY, evidence, {"scheme": name}, **fields)


def _target(
    name: str, target: str, families: tuple[Family, ...], *processors: Processor, evidence: str = "W8A8"
) -> Option:
    technique = Technique(name, weight_bits=8, dtype="int8")
    runtime, export = ("openvino", "openvino") if target.startswith("openvino") else ("onnxruntime", "onnx")
    return Option(name, runtime, export, technique, families, processors, evidence, {"target": target})


OPTIONS: Table[Option] = Table(
    "plan",
    [
        _vllm("FP8_DYNAMIC", 8, "FP8 dynamic", needs="fp8"),
        _vllm("W8A8", 8, "FP8 dynamic", needs="int8"),
        _vllm("W4A16", 4.125, "W4 channel", gptq=True),
        _vllm("W2A16", 2.125, "W2 g32", gptq=True),
        _gguf("Q8_0", 8.5, "FP8 dynamic"),
        _gguf("Q4_0", 4.5, "Q4_0", gptq=True),
        _gguf("TQ2_0", 2.0625, "ternary", gptq=True),
        _target("int8", "onnxruntime", _STATIC, X86),
        _target("int8 (VNNI)", "onnxruntime-vnni", _STATIC, VNNI),
        _target("int8 (ARM)", "onnxruntime-arm", _STATIC, ARM),
        _target("dynamic int8", "onnxruntime-dynamic", ("encoder",), X86, VNNI, ARM, evidence="W8A8 dynamic"),
        _target("int8 in OpenVINO", "openvino", ("convolutional", "unknown"), X86),
        # without VNNI, its integer matrix products are slower than floating-point ones
        Option(
            "int8 weights in OpenVINO", "openvino", "openvino", Technique("int8 weights in OpenVINO", weight_bits=8),
            ("mlp", "encoder"), (X86,), "W8A8", {"weight": {"num_bits": 8}},
        ),
        _target("int8 in OpenVINO (VNNI)", "openvino-vnni", (*_STATIC, "encoder"), VNNI),
    ],
)  # fmt: skip


def default_runtime(family: Family, device: Device) -> str:
    """Return the runtime for a family of models on a device."""
    if family != "language":
        return "onnxruntime"
    return "vllm" if device.processor == GPU else "llamacpp"


def options_of(runtime: str, family: Family, device: Device) -> list[Option]:
    """Return the formats that a runtime computes on a device, those with the most bits first."""
    return [
        each
        for each in OPTIONS.values()
        if each.runtime == runtime
        and family in each.families
        and device.processor in each.processors
        and (not each.needs or each.needs in device.rates)
    ]


@dataclass(frozen=True)
class Evidence:
    """A row of the benchmarks of qatkit."""

    family: str
    format: str
    method: str
    loss: float
    """Percent: relative perplexity of a language model, accuracy points of a classifier."""
    shown: str
    benchmark: str


def evidence_for(family: Family, format: str, methods: Sequence[str]) -> Evidence | None:
    """Return the row with the largest loss among those of a family of models, a format and a method, or None.

    Args:
        family: The family.
        format: The format in the benchmarks.
        methods: The methods, the preferred one first.
    """
    for method in methods:
        rows = [row for row in _rows() if (row.family, row.format, row.method) == (family, format, method)]
        if rows:
            return max(rows, key=lambda row: row.loss)
    return None


@cache
def _rows() -> tuple[Evidence, ...]:
    content = (resources.files("qatkit.advise") / "evidence.json").read_text("utf-8")
    return tuple(Evidence(**row) for row in json.loads(content))
