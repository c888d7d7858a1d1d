"""What a model costs before any file is written: parameters, and multiplications for one input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qatkit.quantization.state import quantizer_prefixes


def parameters(model: nn.Module) -> int:
    """Numbers that training fits, tied ones once, without those of fake quantizers.

    Example:
        >>> parameters(nn.Linear(4, 2))
        10
    """
    own = quantizer_prefixes(model)
    return sum(weight.numel() for name, weight in model.named_parameters() if not own or not name.startswith(own))


def macs(call: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products, convolutions and attention in one call, as torch's flop counter counts.

    Args:
        call: Runs a model once.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> macs(lambda: layer(torch.zeros(3, 4)))
        24
    """
    # the counter does not know attention's fused kernel on the CPU; its products it does
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2
