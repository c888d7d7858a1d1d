"""A training step of two linear layers on a CPU: time and memory of fake quantization, beside torchao.

Run: python benchmarks/qat_step.py [--quick]
Every turn times one step of every method, in random order; ratios are medians of the turns' ratios to plain training.
Memory is what one forward pass keeps for the backward pass, together with the parameters and without the input.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import Claim, finish
from torch import Tensor, nn

from qatkit import QuantSpec, prepare_qat

GROUPS = QuantSpec(4, strategy="group", group_size=128)
FORMATS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "W4A16": (GROUPS, None),
    "W4A8": (GROUPS, QuantSpec(8, symmetric=False, strategy="token")),
    "W4A16, learned scales": (QuantSpec(4, strategy="group", group_size=128, observer="lsq"), None),
    "W8A8": (QuantSpec(8), QuantSpec(8, strategy="token")),
}
TORCHAO = {"W4A16": None, "W4A8": "per_token"}
"""The formats that torchao trains, with its inputs."""
EAGER = {"W4A16": 1.10, "W4A8": 1.15, "W4A16, learned scales": 1.20}
KEPT = {"W4A16": 1.0, "W4A16, learned scales": 1.0, "W8A8": 0.75}
COMPILED = 1.05


def kept(model: nn.Module, x: Tensor) -> int:
    """The bytes of parameters and of tensors for the backward pass, without the input."""
    tensors = [*model.parameters()]

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def torchao_model(model: nn.Module, inputs: str | None) -> None:
    """Prepare a model with torchao's training of the same format."""
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(torch.int4, granularity=PerGroup(128), is_symmetric=True)
    activation = inputs and IntxFakeQuantizeConfig(torch.int8, inputs, is_symmetric=False)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))


def models(width: int, wide: int) -> dict[str, nn.Module]:
    """The models by method."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, wide, bias=False), nn.Linear(wide, width, bias=False))
    made = {"plain": base}
    for name, specs in FORMATS.items():
        made[f"qatkit {name}"] = copy.deepcopy(base)
        prepare_qat(made[f"qatkit {name}"], *specs)
    for name, inputs in TORCHAO.items():
        made[f"torchao {name}"] = copy.deepcopy(base)
        torchao_model(made[f"torchao {name}"], inputs)
    return made


def main(quick: bool) -> None:
    torch.set_num_threads(2)
    width, wide, tokens, turns = (128, 256, 64, 2) if quick else (1024, 4096, 2048, 15)
    x, slope = torch.randn(tokens, width), torch.randn(tokens, width)
    bytes_kept, steps = {}, {}
    for name, model in models(width, wide).items():
        bytes_kept[name] = kept(model, x)
        runs: dict[str, Any] = {"": model, ", compiled": torch.compile(model)}
        for mode, run in runs.items():

            def step(model: nn.Module = model, run: Callable[[Tensor], Tensor] = run) -> None:
                model.zero_grad(set_to_none=True)
                run(x).backward(slope)

            steps[f"{name}{mode}"] = step
            step()  # compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name in bytes_kept:
        row: dict[str, Any] = {"method": name, "ms": 1000 * median(times[name])}
        for mode, key in (("", "x plain"), (", compiled", "compiled, x plain")):
            pairs = zip(times[f"{name}{mode}"], times[f"plain{mode}"], strict=True)
            row[key] = median(own / plain for own, plain in pairs)
        rows.append(row | {"kept, MB": bytes_kept[name] / 1e6, "kept, x plain": bytes_kept[name] / bytes_kept["plain"]})
    if quick:
        print(*rows, sep="\n")
        return
    finish("qat_step", rows, claims_of({row["method"]: row for row in rows}))


def claims_of(rows: dict[str, dict[str, Any]]) -> list[Claim]:
    """The targets, by format."""
    claims = []
    for name in FORMATS:
        row = rows[f"qatkit {name}"]
        if name in EAGER:
            for key, most in (("x plain", EAGER[name]), ("compiled, x plain", COMPILED)):
                text = f"{name}: time of a step{', compiled' * (key != 'x plain')}, relative to plain training"
                claims.append(Claim(text, f"<= {most:.2f}x", f"{row[key]:.2f}x", row[key] <= most))
        if name in KEPT:
            share = row["kept, x plain"]
            text = f"{name}: memory kept for the backward pass, relative to plain training"
            claims.append(Claim(text, f"<= {KEPT[name]:.2f}x", f"{share:.2f}x", round(share, 2) <= KEPT[name]))
    return claims


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers and few turns, nothing written")
    main(parser.parse_args().quick)
