"""Measure the latency of exported files alternately, so that machine load affects all of them equally."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import TypedDict, TypeVar

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import format_of_path

T = TypeVar("T")

Example = Tensor | Mapping[str, Tensor]
"""One input batch."""


@dataclass(frozen=True)
class File:
    """An exported file whose latency is measured."""

    path: Path
    example: Example
    """One input batch: a tensor ``[batch, ...]``, or tensors by input name."""
    format: str | None = None
    """The export format; None infers it from the file name."""

    @property
    def row(self) -> ExportFormat:
        """The row of the export format."""
        return format_of_path(self.path, self.format)


class Latency(TypedDict):
    """Latency of one call at one batch size, in the layout of ``report.json``."""

    batch_size: int
    median_ms: float
    low_ms: float
    """First quartile."""
    high_ms: float
    """Third quartile."""
    repeats: int
    """Number of timed blocks; each takes at least 2 ms, so that the clock's resolution does not matter."""
    threads: int


def bench(
    path: Path, example: Example, batch_sizes: Sequence[int] = (1, 64), threads: int = 1, repeats: int = 30
) -> list[Latency]:
    """Measure the latency of one file in its runtime.

    Args:
        path: A ``.onnx`` file.
        example: One input batch: a tensor ``[batch, ...]``, or tensors by input name; repeated or truncated to each
            batch size.
        batch_sizes: Batch sizes to measure.
        threads: Number of threads that the runtime uses.
        repeats: Timed blocks per batch size.

    Raises:
        QatkitError: latency is not measured for the format, the runtime cannot load the file, or an argument is not
            positive.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.onnx.format import export_onnx
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     [row["batch_size"] for row in bench(Path(folder) / "model.onnx", x, repeats=2)]
        [1, 64]
    """
    return compare({"": path}, example, batch_sizes, threads, repeats)[""]


def compare(
    paths: Mapping[str, Path],
    example: Example,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int = 1,
    repeats: int = 30,
    format: str | None = None,
) -> dict[str, list[Latency]]:
    """Measure the latency of multiple files alternately, so that machine load affects all of them equally.

    Args:
        paths: Files by name.
        example: One input batch that all files accept: a tensor ``[batch, ...]``, or tensors by input name. Tensors
            with the most frequent first dimension are repeated or truncated to each batch size.
        batch_sizes: Batch sizes to measure.
        threads: Threads of the runtime.
        repeats: Number of rounds; each round times every file once, with enough calls to take 2 ms.
        format: The export format of the files; by default it is inferred from their names.

    Returns:
        One entry per batch size, for each name.

    Raises:
        QatkitError: latency is not measured for the format, the runtime cannot load a file, or an argument is not
            positive.
    """
    return compare_files(
        {name: File(path, example, format) for name, path in paths.items()}, batch_sizes, threads, repeats
    )


def compare_files(
    files: Mapping[str, File], batch_sizes: Sequence[int] = (1, 64), threads: int = 1, repeats: int = 30
) -> dict[str, list[Latency]]:
    """Measure files with different inputs alternately; the arguments are those of `compare`.

    Raises:
        QatkitError: latency is not measured for the format, the runtime cannot load a file, or an argument is not
            positive.
    """
    for key, value in (("threads", threads), ("repeats", repeats), *(("batch_sizes", size) for size in batch_sizes)):
        if value < 1:
            raise QatkitError(f"{value} is out of range", key=key, advice="pass a positive integer")
    runtimes = {name: _load(file, threads) for name, file in files.items()}
    rows: dict[str, list[Latency]] = {name: [] for name in files}
    for size in batch_sizes:
        calls = {name: resized_call(runtime, files[name].example, size) for name, runtime in runtimes.items()}
        measured = side_by_side(calls, repeats)
        for name, (low, median, high) in measured.items():
            rows[name].append(
                Latency(
                    batch_size=size,
                    median_ms=median * 1e3,
                    low_ms=low * 1e3,
                    high_ms=high * 1e3,
                    repeats=repeats,
                    threads=threads,
                )
            )
    return rows


def side_by_side(calls: Mapping[str, Callable[[], object]], repeats: int = 30) -> dict[str, tuple[float, float, float]]:
    """Time functions alternately, in a random order in each round.

    Args:
        calls: Functions by name.
        repeats: Number of rounds; each round times every function once, with enough calls to take 2 ms.

    Returns:
        First quartile, median and third quartile of the time per call in seconds, by name.
    """
    counts = {name: _warm_up(call) for name, call in calls.items()}
    times = in_random_order({name: partial(_time, call, counts[name]) for name, call in calls.items()}, repeats)
    quartiles = {}
    for name, measured in times.items():
        low, median, high = quantiles(measured, n=4, method="inclusive") if repeats > 1 else measured * 3
        quartiles[name] = (low, median, high)
    return quartiles


def in_random_order(timers: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every timer once per round, in a new order each time, and return the results by name.

    The order varies, because the previous call determines what is in the processor's caches.
    """
    found: dict[str, list[T]] = {name: [] for name in timers}
    order, draw = list(timers), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            found[name].append(timers[name]())
    return found


def _load(file: File, threads: int) -> Callable[..., object]:
    if not file.row.benchmark:
        raise QatkitError(f"the latency of '{file.row.name}' exports is not measured", key=str(file.path))
    load: Callable[..., object] = file.row.call("benchmark", file.path, threads)
    return load


def resized_call(runtime: Callable[..., object], example: Example, size: int) -> Callable[[], object]:
    """Return a function that calls the runtime with the example, repeated or truncated to a batch size."""
    if isinstance(example, Tensor):
        return partial(runtime, _batch(example, size))
    lengths = Counter(len(tensor) for tensor in example.values() if tensor.dim())
    batch = max(lengths, key=lengths.__getitem__, default=0)  # other inputs, such as a table, do not grow with it
    return partial(
        runtime,
        **{
            name: _batch(tensor, size) if tensor.dim() and len(tensor) == batch else tensor
            for name, tensor in example.items()
        },
    )


def _batch(example: Tensor, size: int) -> Tensor:
    copies = -(-size // len(example))
    return torch.cat([example] * copies)[:size].contiguous()


def _warm_up(call: Callable[[], object], seconds: float = 0.02, block: float = 2e-3) -> int:
    """Run until caches and memory pools are warm; return the number of calls per timed block."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds or count < 3:
        call()
        count += 1
    return max(1, round(block * count / passed))


def _time(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
