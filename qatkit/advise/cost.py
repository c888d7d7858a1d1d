"""The cost of a model: number of parameters, and multiply-accumulate operations (MACs) for one input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qatkit.quantization.state import quantizer_prefixes


def parameters(model: nn.Module) -> int:
    """Count the parameters of a model; tied parameters are counted once, and fake quantizers are excluded.

    Example:
        >>> parameters(nn.Linear(4, 2))
        10
    """
    own = quantizer_prefixes(model)
    return sum(weight.numel() for name, weight in model.named_parameters() if not own or not name.startswith(own))


def macs(call: Callable[[], object]) -> int:
    """Count the MACs of matrix products, convolutions and attention in one call, with torch's FLOP counter.

    Args:
        call: Runs a model once.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> macs(lambda: layer(torch.zeros(3, 4)))
        24
    """
    # the counter does not know the fused attention kernel on the CPU, but it knows the products of the math kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2
