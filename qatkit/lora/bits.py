"""Frozen weights of 4 or 8 bits, held by bitsandbytes, and their exact way back.

bitsandbytes repacks a 4-bit weight in place when a layer runs in eval mode on a CPU with AVX512-BF16. From then on its
gradients are lost and what dequantizes, merges or saves it reads garbage: a validation loop inside training is enough.
Every 4-bit layer that passes through here has that switched off.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import nn

from qatkit.errors import QatkitError

Bits = Literal[4, 8]
OUTLIERS = 6.0
"""Inputs from here on are multiplied in 16 bits (LLM.int8, https://arxiv.org/abs/2208.07339)."""


def check_backend(device: torch.device) -> None:
    """Raise unless bitsandbytes quantizes to 4 bits on the device and back."""
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(1, 64, device=device), quant_type="nf4")
        functional.dequantize_4bit(packed, state).sum().item()
    except Exception as error:  # a missing library, kernel or device each raise something else
        said = " ".join(str(error).split())[:200]
        raise QatkitError(
            f"bits: bitsandbytes cannot quantize on {device.type} ({type(error).__name__}: {said}); write bits: null, "
            "which trains adapters on the weights as they are, or an accelerator that it supports"
        ) from error


def quantize_base(
    model: nn.Module,
    names: Iterable[str],
    bits: Bits,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Replace linear layers by frozen ones of 4 or 8 bits, in place, one at a time.

    Args:
        model: Any module.
        names: Layers of exactly type `nn.Linear`.
        bits: 4, or 8 for LLM.int8.
        quant_type: The grid of 4 bits.
        double_quant: Keep the scales of 4-bit blocks in 8 bits as well.
        compute_dtype: What 4-bit layers multiply in; by default the weight's dtype.
    """
    from bitsandbytes import nn as bnb

    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        weight, bias = layer.weight.detach(), layer.bias
        sizes = (layer.in_features, layer.out_features, bias is not None)
        made: Any
        if bits == 4:
            dtype = compute_dtype or weight.dtype
            made = bnb.Linear4bit(
                *sizes, compute_dtype=dtype, compress_statistics=double_quant, quant_type=quant_type, device="meta"
            )
            made.weight = bnb.Params4bit(
                weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=made
            ).to(weight.device)
            made.register_load_state_dict_pre_hook(_load_4bit)
        else:
            made = bnb.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
            # from the CPU: what lies on a GPU already it takes for quantized, and leaves as it is
            made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
            made.register_load_state_dict_pre_hook(_load_8bit)
            made.plain_dtype = weight.dtype  # bitsandbytes keeps it of 4 bits alone
            # it says on every call of every layer that inputs are multiplied in 16 bits
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        made.train(layer.training)
        set_child(model, name, made)
    make_safe(model)


def make_safe(model: nn.Module) -> list[str]:
    """Keep bitsandbytes from repacking the 4-bit weights of a model in place.

    Returns:
        The names of its 4-bit layers.
    """
    found = [(name, layer) for name, layer in model.named_modules() if kind_of(layer) == 4]
    for _, layer in found:
        cast(Any, layer).support_avx512bf16_for_cpu = False
    return [name for name, _ in found]


def kind_of(layer: nn.Module) -> Bits | None:
    """4 or 8 where the layer is one of bitsandbytes, whose import is not needed to tell."""
    kinds = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    return 4 if "Linear4bit" in kinds else 8 if "Linear8bitLt" in kinds else None


@torch.no_grad()
def dequantized(layer: nn.Module, device: torch.device | str | None = None) -> nn.Linear:
    """A plain layer with exactly the values that a layer of bitsandbytes stands for.

    Args:
        layer: A `Linear4bit` or `Linear8bitLt`.
        device: Where the plain layer lives; by default where the layer does.
    """
    from bitsandbytes import functional

    weight: Any = layer.weight
    if kind_of(layer) == 4:
        plain = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        scales = weight.SCB if weight.SCB is not None else cast(Any, layer).state.SCB
        plain = functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        plain = plain.to(getattr(layer, "plain_dtype", plain.dtype))
    assert isinstance(layer, nn.Linear)
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(plain.to(device), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    return made.train(layer.training)


def set_child(model: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, child)


def _load_4bit(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a 4-bit weight with its scales, which bitsandbytes saves in a state dict and does not read from one."""
    from bitsandbytes import nn as bnb

    start = f"{prefix}weight."
    statistics = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
    if statistics:
        packed, device = state_dict[f"{prefix}weight"], layer.weight.device
        layer.weight = bnb.Params4bit.from_prequantized(packed, statistics, device=device, module=layer)


def _load_8bit(layer: nn.Module, *_: Any) -> None:
    """Let a layer that has run load: its first forward pass puts its scales where bitsandbytes does not load them."""
    weight: Any = layer.weight
    if weight.SCB is None:
        weight.CB, weight.SCB = layer.state.CB, layer.state.SCB  # type: ignore[union-attr]
