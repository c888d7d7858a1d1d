"""Measure files as a server runs them: latency percentiles, throughput, load time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.export.formats import FORMATS
from qatkit.report.bench import File, in_random_order, resized_call

SECONDS = 3.0
"""Time per file and batch size, about."""


@dataclass(frozen=True)
class Ratio:
    """The speed of one file relative to another: the median over paired calls, with a 95% interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Served:
    """Size, load time, memory use and latency of one exported file in its runtime."""

    bytes: int
    load_seconds: float
    """Time to load the file in a new process."""
    resident_bytes: int | None
    """Growth of that process's resident memory during loading and the first calls; None if the system has no
    ``/proc``."""
    seconds: Mapping[int, np.ndarray[Any, Any]]
    """Latency of every call, by batch size; calls with the same index ran in the same round."""

    def percentile(self, batch: int, percent: float) -> float:
        """A percentile of the latency at a batch size, in seconds."""
        return float(np.percentile(self.seconds[batch], percent))

    def throughput(self, batch: int) -> float:
        """Samples per second at the median latency."""
        return batch / self.percentile(batch, 50)


def serve(files: Mapping[str, File], batch_sizes: Sequence[int], threads: int) -> dict[str, Served]:
    """Measure files with alternating calls, so that machine load affects all of them equally.

    Args:
        files: Files by name, each with an input batch that is repeated or truncated to each batch size.
        batch_sizes: Batch sizes to measure.
        threads: Number of threads that the runtimes use.

    Returns:
        The measurements, by name.

    Raises:
        QatkitError: a runtime cannot load its file.
    """
    footprints = {name: _footprint(file, batch_sizes, threads) for name, file in files.items()}
    runtimes = {name: file.row.call("benchmark", file.path, threads) for name, file in files.items()}
    seconds: dict[str, dict[int, np.ndarray[Any, Any]]] = {name: {} for name in files}
    for size in batch_sizes:
        calls = {name: resized_call(runtime, files[name].example, size) for name, runtime in runtimes.items()}
        for name, times in _alternate(calls).items():
            seconds[name][size] = times
    return {name: Served(file.row.size(file.path), *footprints[name], seconds[name]) for name, file in files.items()}


def speedup(slow: np.ndarray[Any, Any], fast: np.ndarray[Any, Any]) -> Ratio:
    """Return the speed of one file relative to another, from paired latencies.

    Example:
        >>> speedup(np.full(9, 0.5), np.full(9, 0.25)).median
        2.0
    """
    pairs = slow / fast
    draws = np.random.default_rng(0).integers(0, len(pairs), (1000, len(pairs)))
    low, high = np.percentile(np.median(pairs[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(pairs)), float(low), float(high))


def _alternate(calls: Mapping[str, Callable[[], object]]) -> dict[str, np.ndarray[Any, Any]]:
    warm = {name: [_timed(call) for _ in range(5)] for name, call in calls.items()}
    rounds = int(np.clip(SECONDS / np.mean([min(times) for times in warm.values()]), 20, 300))
    timed = in_random_order({name: partial(_timed, call) for name, call in calls.items()}, rounds)
    return {name: np.array(times) for name, times in timed.items()}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _footprint(file: File, batch_sizes: Sequence[int], threads: int) -> tuple[float, int | None]:
    """Load time in seconds and bytes of memory in a new process."""
    example = file.example
    arrays = example.numpy() if isinstance(example, Tensor) else {name: each.numpy() for name, each in example.items()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_load_and_run, file.path, arrays, batch_sizes, threads, file.row.name).result()


def _load_and_run(
    path: Path, arrays: Any, batch_sizes: Sequence[int], threads: int, format: str
) -> tuple[float, int | None]:
    example = (
        torch.from_numpy(arrays)
        if isinstance(arrays, np.ndarray)
        else {name: torch.from_numpy(each) for name, each in arrays.items()}
    )
    row = FORMATS[format]
    import_module(row.runtime_module)
    before, start = _resident_bytes(), time.perf_counter()
    runtime = row.call("benchmark", path, threads)
    loaded = time.perf_counter() - start
    for size in batch_sizes:
        resized_call(runtime, example, size)()
    after = _resident_bytes()
    return loaded, None if before is None or after is None else after - before


def _resident_bytes() -> int | None:
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return None
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
