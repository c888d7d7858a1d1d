"""Measure structured pruning: size and speed of the smaller model, and whether transformers and torch load it.

Run: python benchmarks/shrink.py [--quick]
Takes about two minutes; --quick takes seconds, with smaller models and fewer rounds.

Half of the MLP neurons, half of the heads (with their keys and values) and a third of the layers are removed from a
Llama with random weights, and half of the channels from the digits CNN. Each result is saved, loaded without qatkit's
pruning code (`AutoModelForCausalLM.from_pretrained`, or `load_state_dict` of a model that the factory builds from the
recorded arguments), and must compute the same. Multiply-adds are counted by torch's flop counter. Latency is that of
plain PyTorch on one thread for one sample: the median over rounds that alternate between the large and the small model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch
from harness import Claim, finish
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qatkit.advise.cost import macs, parameters
from qatkit.recipe import FactoryConfig, ShrinkConfig
from qatkit.report.bench import side_by_side
from qatkit.run.architecture import Architecture, architecture_of, build_architecture
from qatkit.stages.shrink import apply


def call(model: nn.Module, batch: Any) -> Tensor:
    """Logits of a text or an image."""
    found = model(batch[0])
    return found.logits if hasattr(found, "logits") else found


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Loss of the next token or of the class."""
    logits, labels = call(model, batch), batch[1]
    return (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if labels.dim() > 1
        else F.cross_entropy(logits, labels)
    )


def measure(name: str, factory: FactoryConfig, config: ShrinkConfig, batches: list[Any], rounds: int) -> dict[str, Any]:
    """Shrink, load again, count and time one model."""
    torch.manual_seed(0)
    whole = build_architecture(Architecture(factory)).eval()
    small = apply(config, whole, batches, call, loss).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if hasattr(small, "save_pretrained"):
            small.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder).eval()
        else:
            again = build_architecture(architecture_of(small, Architecture(factory))).eval()
            again.load_state_dict(small.state_dict())
        same = torch.equal(call(again, batches[0]), call(small, batches[0]))
    one = [part[:1] for part in batches[0]]
    counts = [(parameters(model), macs(lambda model=model: call(model, one))) for model in (whole, again)]
    with torch.inference_mode():
        times = side_by_side({"whole": lambda: call(whole, one), "small": lambda: call(again, one)}, rounds)
    before, after = (times[key][1] * 1e3 for key in ("whole", "small"))
    return {
        "model": name,
        "importance": config.importance,
        "parameters": f"{counts[0][0]:,} -> {counts[1][0]:,}",
        "MACs": f"{counts[0][1]:,} -> {counts[1][1]:,}",
        "MACs ratio": round(counts[0][1] / counts[1][1], 2),
        "ms": f"{before:.3g} -> {after:.3g}",
        "latency ratio": round(before / after, 2),
        "loads, identical outputs": "yes" if same else "NO",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    width, context, rounds = (64, 16, 10) if quick else (512, 128, 100)
    sizes = {"vocab_size": 2048, "hidden": width, "layers": 6, "heads": 8, "kv_heads": 8, "intermediate": 3 * width}
    llama = FactoryConfig("qatkit.models:llama", sizes | {"context": context})
    channels = FactoryConfig("qatkit.models:cnn", {"channels": [16, 32, 32] if quick else [64, 128, 128]})
    tokens = [torch.randint(2048, (4, context), generator=generator) for _ in range(2)]
    images = [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(2)]
    classes = torch.randint(10, (16,), generator=generator)
    rows = []
    for importance in ("activation", "magnitude", "taylor"):
        cut = ShrinkConfig(layers=4, heads=0.5, neurons=0.5, importance=importance)
        rows.append(measure("Llama", llama, cut, [(text, text) for text in tokens], rounds))
        fewer = ShrinkConfig(channels=0.5, importance=importance)
        rows.append(measure("CNN", channels, fewer, [(image, classes) for image in images], rounds))
    claims = [
        Claim(
            "shrunk models that load in plain transformers or torch with identical outputs",
            "all",
            f"{sum(row['loads, identical outputs'] == 'yes' for row in rows)} of {len(rows)}",
            all(row["loads, identical outputs"] == "yes" for row in rows),
        )
    ]
    if not quick:
        worst = min(row["latency ratio"] / row["MACs ratio"] for row in rows if row["model"] == "Llama")
        claims.append(
            Claim(
                "speedup of the Llama relative to its reduction in multiply-adds",
                ">= 0.7",
                f"{worst:.2f}",
                worst >= 0.7,
            )
        )
    if quick:  # proves the mechanics; its numbers are no result
        for row in rows:
            print(" | ".join(map(str, row.values())))
        sys.exit(0 if claims[0].holds else 1)
    finish("shrink", rows, claims)


if __name__ == "__main__":
    main()
