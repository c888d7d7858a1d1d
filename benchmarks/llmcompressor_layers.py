"""Quantize single layers with llm-compressor; `benchmarks/starting_points.py` runs this in another environment.

Run: python llmcompressor_layers.py IN.safetensors JOBS.json OUT.safetensors

IN holds ``{layer}.weight`` and ``{layer}.x``; a job is ``{name, layer, method, bits, group_size, observer}``; OUT holds
the outputs ``{name}`` of the quantized layer for its input, with scaled weights.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Norm(nn.Module):
    """The part of a norm that absorbs scales."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Pair(nn.Module):
    """A norm and the layer that reads it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.norm = Norm(weight.shape[1])
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.norm(x))


def modifiers(job: dict[str, Any]) -> list[Any]:
    weights: dict[str, Any] = {"num_bits": job["bits"], "symmetric": True, "observer": f"memoryless_{job['observer']}"}
    weights |= {"strategy": "group", "group_size": job["group_size"]} if job["group_size"] else {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if job["method"] == "gptq":
        return [GPTQModifier(config_groups={"group_0": group})]
    if job["method"] == "awq":
        mapping = AWQMapping("re:.*norm$", ["re:.*linear$"])
        return [AWQModifier(mappings=[mapping]), QuantizationModifier(config_groups={"group_0": group})]
    group["input_activations"] = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    smooth = SmoothQuantModifier(mappings=[(["re:.*linear$"], "re:.*norm$")])
    return [smooth, QuantizationModifier(config_groups={"group_0": group})]


def main(inputs: str, jobs: str, outputs: str) -> None:
    logger.remove()
    torch.set_num_threads(1)
    if not torch.accelerator.is_available():  # AWQModifier pins its cache, which torch refuses without a device
        IntermediatesCache.pin_memory = lambda *_: None
    tensors, results = load_file(inputs), {}
    with open(jobs) as file:
        todo = json.load(file)
    for job in todo:
        pair, x = Pair(tensors[f"{job['layer']}.weight"]).eval(), tensors[f"{job['layer']}.x"][None]
        session = active_session()
        session.reset()
        batches = [{"x": part} for part in x.split(1024, dim=1)]
        session.initialize(model=pair, start=-1, recipe=modifiers(job), calib_data=batches)
        LifecycleCallbacks.calibration_start()
        # as its sequential pipeline does; in the basic one AWQ searches with scales that are not set yet
        with calibration_forward_context(pair), DisableQuantization(pair):
            for batch in batches:
                pair(**batch)
            LifecycleCallbacks.sequential_epoch_end(list(pair.modules()))
        LifecycleCallbacks.calibration_end()
        session.finalize()
        with torch.no_grad():
            results[job["name"]] = pair(x)[0]
    save_file(results, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
