"""The table of `qatkit advise`: formats per runtime, with their effect on the roofline and the evidence for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from qatkit.advise.devices import Device
from qatkit.advise.roofline import Technique
from qatkit.common.tables import Table

X86, ARM, GPU = "x86", "arm", "gpu"
_PROCESSORS = {"xeon-8480": X86, "epyc-9654": X86, "raspberry-pi-5": ARM, "m1-max": ARM, "m2-ultra": ARM}
_VNNI = ("xeon-8480", "epyc-9654")


@dataclass(frozen=True)
class Option:
    """A compressed format in a runtime."""

    name: str
    runtime: str
    export: str
    """The export format."""
    technique: Technique
    language: bool
    """Whether it is for language models, or for other models."""
    evidence: str
    """The nearest format in the benchmarks."""
    quantize: Mapping[str, Any] = field(default_factory=dict)
    """The ``quantize`` block without a method."""
    gptq: bool = False
    """Whether GPTQ is the method without training; otherwise, scales are calibrated."""
    learned: bool = True
    """Whether training learns the scales (LSQ)."""
    needs: str = ""
    """The dtype whose rate the device must have."""
    processors: tuple[str, ...] = (GPU, X86, ARM)
    vnni: bool | None = None
    """Whether the processor must have VNNI; None for either."""


def _language(name: str, runtime: str, bits: float, evidence: str, **fields: Any) -> Option:
    technique = Technique(name, weight_bits=bits, dtype=fields.get("needs") or None)
    export = {"vllm": "compressed_tensors", "llamacpp": "gguf"}[runtime]
    return Option(name, runtime, export, technique, True, evidence, {"scheme": name}, **fields)


def _target(name: str, runtime: str, target: str, **fields: Any) -> Option:
    technique = Technique(name, weight_bits=8, dtype="int8")
    export = {"onnxruntime": "onnx", "openvino": "openvino"}[runtime]
    return Option(name, runtime, export, technique, False, "W8A8", {"target": target}, **fields)


OPTIONS: Table[Option] = Table(
    "plan",
    [
        _language("FP8_DYNAMIC", "vllm", 8, "FP8 dynamic", needs="fp8", processors=(GPU,)),
        _language("W8A8", "vllm", 8, "FP8 dynamic", needs="int8", processors=(GPU,)),
        _language("W4A16", "vllm", 4.125, "W4 channel", gptq=True, processors=(GPU,)),
        _language("W2A16", "vllm", 2.125, "W2 g32", gptq=True, processors=(GPU,)),
        _language("Q8_0", "llamacpp", 8.5, "FP8 dynamic"),
        _language("Q4_0", "llamacpp", 4.5, "Q4_0", gptq=True),
        _language("TQ2_0", "llamacpp", 2.0625, "ternary", gptq=True),
        _target("int8", "onnxruntime", "onnxruntime", processors=(X86,), vnni=False),
        _target("int8 (VNNI)", "onnxruntime", "onnxruntime-vnni", processors=(X86,), vnni=True),
        _target("int8 (ARM)", "onnxruntime", "onnxruntime-arm", processors=(ARM,)),
        _target("int8 in OpenVINO", "openvino", "openvino", processors=(X86,), vnni=False),
        _target("int8 in OpenVINO (VNNI)", "openvino", "openvino-vnni", processors=(X86,), vnni=True),
    ],
)
RUNTIMES = ("vllm", "llamacpp", "onnxruntime", "openvino")


def processor_of(device: Device) -> str:
    """Return the kind of a device: "gpu", "x86" or "arm"."""
    return _PROCESSORS.get(device.name, GPU)


def default_runtime(language: bool, processor: str) -> str:
    """Return the runtime for a model on a kind of device."""
    if not language:
        return "onnxruntime"
    return "vllm" if processor == GPU else "llamacpp"


def options_of(runtime: str, language: bool, device: Device) -> list[Option]:
    """Return the formats that a runtime computes on a device, those with the most bits first."""
    processor = processor_of(device)
    return [
        each
        for each in OPTIONS.values()
        if each.runtime == runtime
        and each.language == language
        and processor in each.processors
        and (not each.needs or each.needs in device.rates)
        and each.vnni in (None, device.name in _VNNI)
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


def evidence_for(family: str, format: str, methods: Sequence[str]) -> Evidence | None:
    """Return the row with the largest loss among those of a family of models, a format and a method, or None.

    Args:
        family: "language", "convolutional" or "mlp".
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
