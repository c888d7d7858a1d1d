"""Measure the memory bandwidth and the matrix rates of this machine's CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch

from qatkit.advise.devices import Device

_BYTES = 2**28
_SIDE = 1024


def local_device() -> Device:
    """Measure this machine with all of torch's threads, which takes a few seconds.

    The bandwidth is measured with a copy, which reads and writes. The rates are measured with products of square
    matrices in fp32 and bf16. int8 is omitted, because PyTorch's int8 product is much slower than that of runtimes.
    """
    source = torch.zeros(_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * _BYTES / _seconds(lambda: target.copy_(source)) / 1e9
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(_SIDE, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
        rates[name] = _rate(lambda left=left, right=right: left @ right)  # type: ignore[misc]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    threads = torch.get_num_threads()
    return Device("local", None, round(pages, 1), bandwidth, rates, f"measured on this machine with {threads} threads")


def _rate(product: Callable[[], object]) -> float:
    return 2 * _SIDE**3 / _seconds(product) / 1e12


def _seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)
