"""A training step of linear layers as wide as those of Llama-3-8B, plain and fake-quantized, for benchmarks/gpu.py.

The reference is torchao's layers of the same formats, if torchao is installed. In torchtune, its training with int8
activations and int4 weights took 546 / 360 = 1.52 times as long as plain training of that model on six A100s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from gpu_timing import FAILED, Methods, Row, failed, measured
from harness import Claim
from torch import nn

from qatkit import QuantSpec, prepare_qat

TORCHTUNE = 546 / 360
FORMATS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "W4A16": (QuantSpec(4, strategy="group", group_size=128), None),
    "W4A16 lsq": (QuantSpec(4, strategy="group", group_size=128, observer="lsq"), None),
    "W4A8": (QuantSpec(4, strategy="group", group_size=128), QuantSpec(8, symmetric=False, strategy="token")),
}
"""int4 in groups of 128 with scales from the range or learned; with dynamic int8 inputs per token."""


def steps(size: dict[str, int], device: torch.device) -> list[Row]:
    """Forward and backward of two feed-forward pairs of linear layers, bfloat16."""
    width, wide, tokens = size["qat width"], size["qat wide"], size["qat tokens"]
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    pairs = [nn.Linear(*shape, bias=False, **options) for _ in range(2) for shape in ((width, wide), (wide, width))]
    base = nn.Sequential(*pairs)
    x = torch.randn(tokens, width, **options, requires_grad=True)  # of a layer before
    slope = torch.randn(tokens, width, **options)

    def step(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def once() -> None:
            x.grad = None
            model.zero_grad(set_to_none=True)
            run(x).backward(slope)

        return once

    what = f"QAT step, {tokens:,} tokens, 2 x ({width} -> {wide} -> {width}), bfloat16"
    methods: Methods = {}
    rows: list[Row] = []
    makers: dict[str, Callable[[nn.Module], object]] = {"plain": lambda model: None}
    for name, (weight, inputs) in FORMATS.items():
        makers[f"qatkit {name}"] = lambda model, how=(weight, inputs): prepare_qat(model, *how)  # type: ignore[misc]
        if find_spec("torchao") and weight.observer == "minmax":
            makers[f"torchao {name}"] = lambda model, eight=inputs is not None: _torchao(model, eight)  # type: ignore[misc]
    for name, make in makers.items():
        try:
            model = copy.deepcopy(base)
            make(model)
        except Exception as error:  # the others are measured all the same
            rows.append(failed(what, name, error))
            continue
        methods[name] = step(model, model)
        if device.type == "cuda":
            methods[f"{name}, compiled"] = step(model, torch.compile(model))
    return [*measured(what, methods, 2 * size["turns"], device, calls=5), *rows]


def _torchao(model: nn.Module, inputs: bool) -> None:
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(torch.int4, granularity=PerGroup(128), is_symmetric=True)
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if inputs else None
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))


def claims_of(rows: list[Row]) -> list[Claim]:
    """Not slower than torchao, and, compiled, an overhead at most as large as that of torchtune on a whole model."""
    times = {
        row["method"]: row["ms"] for row in rows if row["operation"].startswith("QAT step") and row["ms"] != FAILED
    }
    claims = []
    for mode in ("", ", compiled"):
        plain = times.get(f"plain{mode}")
        for name in FORMATS:
            ours, theirs = (times.get(f"{who} {name}{mode}") for who in ("qatkit", "torchao"))
            if ours is not None and theirs is not None:
                seen = f"{ours:.2f} ms and {theirs:.2f} ms"
                claims.append(
                    Claim(f"QAT step, {name}{mode}, compared with torchao", "not slower", seen, ours <= theirs)
                )
            if mode and ours is not None and plain is not None:
                share = ours / plain
                text = f"QAT step, {name}{mode}, relative to a step without QAT"
                claims.append(Claim(text, f"<= {TORCHTUNE:.2f}x", f"{share:.2f}x", share <= TORCHTUNE))
    return claims
