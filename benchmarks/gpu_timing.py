"""Time and memory of methods that alternate on one device, for benchmarks/gpu.py."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Methods = dict[str, Callable[[], object]]
Row = dict[str, Any]
FAILED = "failed"


def measured(
    what: str, methods: Methods, turns: int, device: torch.device, held: int | None = None, calls: int = 1
) -> list[Row]:
    """Median milliseconds and peak memory in MB of each method, after two warmup turns.

    A method that raises gets a row that says so, and its traceback is printed.

    Args:
        what: Label of the group.
        methods: Functions by name.
        turns: Measured turns.
        device: The device.
        held: Bytes above which memory counts; default: the allocated bytes before each turn.
        calls: Calls per turn, back to back, counted as one: CPU work before a call is then hidden behind GPU work, as
        in
            training.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    memory = dict.fromkeys(methods, 0)
    broken: dict[str, Row] = {}
    for turn in range(2 + turns):
        for name, method in methods.items():
            if name in broken:
                continue
            try:
                took, peak = _once(method, device, held, calls)
            except Exception as error:  # the other methods are measured all the same
                broken[name] = failed(what, name, error)
                continue
            if turn >= 2:
                times[name].append(took)
                memory[name] = max(memory[name], peak)
    return [
        broken.get(name)
        or {
            "operation": what,
            "method": name,
            "ms": round(median(times[name]), 3),
            "extra memory, MB": round(memory[name] / 1e6) if device.type == "cuda" else "",
        }
        for name in methods
    ]


def failed(what: str, method: str, error: Exception) -> Row:
    """The row of a method that raised."""
    print(f"{what}, {method}:")
    traceback.print_exception(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"operation": what, "method": method, "ms": FAILED, "extra memory, MB": type(error).__name__}


def _once(method: Callable[[], object], device: torch.device, held: int | None, calls: int) -> tuple[float, int]:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            method()
        return 1000 * (time.perf_counter() - started) / calls, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if held is None else held
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        method()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls, torch.cuda.max_memory_allocated() - before
