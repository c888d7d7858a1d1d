"""Frozen 4-bit and 8-bit bitsandbytes weights, and their exact dequantization.

bitsandbytes repacks a 4-bit weight in place when a layer runs in eval mode on a CPU with AVX512-BF16. Afterwards,
gradients are lost, and dequantizing, merging or saving reads garbage. A single validation loop during training is
enough to cause this. `make_safe` disables repacking.

For an 8-bit weight, bitsandbytes keeps two copies of codes and scales, and moves only one when a model moves to another
device. Without a fix, a weight packed on the CPU would then be multiplied by inputs on the GPU, and a weight loaded
after a move would be ignored. `make_safe` makes each layer use its current weight on any device.
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
"""Inputs of at least this magnitude are multiplied in 16 bits (LLM.int8, https://arxiv.org/abs/2208.07339)."""


def check_backend(device: torch.device) -> None:
    """Raise an error if bitsandbytes cannot quantize and dequantize 4-bit weights on the device.

    Raises:
        QatkitError: bitsandbytes is not installed, or does not support the device.
    """
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(torch.ones(1, 64, device=device), quant_type="nf4")
        functional.dequantize_4bit(packed, state).sum().item()
    except Exception as error:  # a missing library, kernel and device raise different errors
        reason = " ".join(str(error).split())[:200]
        raise QatkitError(
            f"bitsandbytes cannot quantize on {device.type} ({type(error).__name__}: {reason})",
            key="bits",
            advice="set bits: null to train adapters on full-precision weights, or use a supported accelerator",
        ) from error


def quantize_base(
    model: nn.Module,
    names: Iterable[str],
    bits: Bits,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Replace linear layers with frozen 4-bit or 8-bit layers, in place, one at a time.

    Args:
        model: Any module.
        names: Layers of exactly type `nn.Linear`.
        bits: 4, or 8 for LLM.int8.
        quant_type: The 4-bit data type.
        double_quant: Quantize the scales of 4-bit blocks to 8 bits.
        compute_dtype: Dtype of 4-bit matrix products. The default is the weight's dtype.
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
            # from the CPU, because bitsandbytes assumes that a weight on a GPU is already quantized
            made.weight = bnb.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
            made.register_load_state_dict_pre_hook(_load_8bit)
            made.plain_dtype = weight.dtype  # bitsandbytes stores it for 4 bits only
            # it logs on each call of each layer that inputs are cast to 16 bits
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        made.train(layer.training)
        set_child(model, name, made)
    make_safe(model)


def make_safe(model: nn.Module) -> list[str]:
    """Prevent in-place repacking of 4-bit weights and stale copies of 8-bit weights.

    Returns:
        The names of the 4-bit layers.
    """
    packed = [(name, layer) for name, layer in model.named_modules() if kind_of(layer) == 4]
    for _, layer in packed:
        cast(Any, layer).support_avx512bf16_for_cpu = False
    for layer in model.modules():
        if kind_of(layer) == 8 and _follow_weight not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_follow_weight)
    return [name for name, _ in packed]


def kind_of(layer: nn.Module) -> Bits | None:
    """Return 4 or 8 for a bitsandbytes layer, otherwise None, without importing the library."""
    kinds = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    return 4 if "Linear4bit" in kinds else 8 if "Linear8bitLt" in kinds else None


@torch.no_grad()
def dequantized(layer: nn.Module, device: torch.device | str | None = None) -> nn.Linear:
    """Return a plain layer with exactly the dequantized values of a bitsandbytes layer.

    Args:
        layer: A `Linear4bit` or `Linear8bitLt`.
        device: Device of the plain layer. The default is the device of `layer`.
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
    """Replace the submodule with the given name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, child)


def _load_4bit(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a 4-bit weight with its scales, which bitsandbytes saves in a state dict but does not load."""
    from bitsandbytes import nn as bnb

    start = f"{prefix}weight."
    statistics = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
    if statistics:
        packed, device = state_dict[f"{prefix}weight"], layer.weight.device
        layer.weight = bnb.Params4bit.from_prequantized(packed, statistics, device=device, module=layer)


def _follow_weight(layer: nn.Module, _: object) -> None:
    """Use the current weight, which `Module.to`, copies and state dicts may have changed, instead of a stale copy."""
    weight, state = cast(Any, layer.weight), cast(Any, layer).state
    scales = weight.SCB if weight.SCB is not None else state.SCB
    if weight.dtype is torch.int8 and scales is not None:
        state.CB, state.SCB = weight.data, scales.to(weight.device)
        weight.CB = weight.SCB = None  # as after every forward pass of bitsandbytes


def _load_8bit(layer: nn.Module, *_: Any) -> None:
    """Allow loading into a layer that has run: its first forward pass moves the scales to a place where bitsandbytes
    does not load them."""
    weight: Any = layer.weight
    if weight.SCB is None:
        weight.CB, weight.SCB = layer.state.CB, layer.state.SCB  # type: ignore[union-attr]
