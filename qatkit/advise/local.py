"""Measure the memory bandwidth and the matrix rates of this machine's CPU."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from qatkit.advise.devices import Device

_BYTES = 2**28
_SIDES = (64, 128, 256, 1024)
_SLOW = 0.005
"""Seconds of a product after which larger matrices are not tried: without bf16 instructions, they take seconds."""


def local_device() -> Device:
    """Measure this machine with all of torch's threads, which takes about a second.

    The bandwidth is measured with a copy, which reads and writes. The rates are the highest of products of square
    matrices of several sizes in fp32 and bf16. int8 is omitted, because PyTorch's int8 product is much slower than that
    of runtimes.
    """
    source = torch.zeros(_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * _BYTES / _seconds(lambda: target.copy_(source)) / 1e9
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates[name] = _rate(dtype)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    threads = torch.get_num_threads()
    return Device("local", None, round(pages, 1), bandwidth, rates, f"measured on this machine with {threads} threads")


def _rate(dtype: torch.dtype) -> float:
    """The highest rate of the products of square matrices of several sizes, in TFLOP/s."""
    best = 0.0
    for side in _SIDES:
        matrix = torch.ones(side, side, dtype=dtype)
        took = _seconds(functools.partial(torch.mm, matrix, matrix))
        best = max(best, 2 * side**3 / took / 1e12)
        if took > _SLOW:
            break
    return best


def _seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)  # a peak rate: other work on the machine only makes calls slower
