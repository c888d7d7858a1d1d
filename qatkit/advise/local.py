"""Measure the memory bandwidth and the matrix rates of this machine's CPU."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from qatkit.advise.devices import Device

_REPEATS = 7
_BYTES = 2**28
_CACHED = (2**20, 2**22, 2**24, 2**26)
"""Bytes of data that repeated calls may find in caches."""
_PART = 2**22
"""Bytes that are copied at a time: short enough that other processes rarely interrupt it."""
_SIDES = (64, 128, 256, 512, 1024)
_LEAST = 0.05
"""Seconds for which a call is repeated at least."""
_SLOW = 0.05
"""Seconds of a product after which larger matrices are not tried: without bf16 instructions, they take seconds."""
_CHAINED = 200
"""Operators in the graph that measures the time per operator."""


def local_device(threads: int | None = None) -> Device:
    """Measure this machine, which takes a few seconds.

    The bandwidth is measured with a copy, which reads and writes, of data that fit into no cache, and of smaller data.
    The rates are the highest of products of square matrices of several sizes: fp32 and bf16 in PyTorch, int8 in ONNX
    Runtime, because PyTorch's int8 product is much slower than that of runtimes. Without ONNX Runtime, there is no rate
    for int8.

    Args:
        threads: Threads per product; None uses all of torch's threads.
    """
    before = torch.get_num_threads()
    threads = threads or before
    copies = dict.fromkeys((*_CACHED, _BYTES), 0.0)
    rates = {"fp32": 0.0, "bf16": 0.0}
    try:
        for count in sorted({1, threads}):  # on a busy machine, several threads wait for each other
            torch.set_num_threads(count)
            copies = {size: max(rate, _copied(size if size == _BYTES else size // 2)) for size, rate in copies.items()}
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                rates[name] = max(rates[name], _rate(_in_torch(dtype)))
    finally:
        torch.set_num_threads(before)
    bandwidth = copies.pop(_BYTES)
    caches = [(size, max(rate, bandwidth)) for size, rate in copies.items()]
    source, call, operator = f"measured on this machine with {threads} threads", 0.0, 0.0
    if absent := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        source += f", without int8, because {' and '.join(absent)} is not installed"
    else:
        rates["int8"] = _rate(lambda side: _int8_product(side, threads))
        call, operator = _overheads(threads)
        source += ", int8 in ONNX Runtime"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Device(
        "local", None, round(pages, 1), bandwidth, rates, source, caches=tuple(caches), call=call, operator=operator
    )


def _copied(size: int) -> float:
    """The rate of reading and writing in GB/s, in copies of parts of `size` bytes; the fastest part counts."""
    part = min(size, _PART) // 4
    source = torch.zeros(size // 4)
    target = torch.zeros(size // 4)
    pairs = list(zip(source.view(-1, part).unbind(), target.view(-1, part).unbind(), strict=True))
    took = [math.inf] * len(pairs)
    for _ in range(_REPEATS):
        for index, (read, written) in enumerate(pairs):
            began = time.perf_counter()
            written.copy_(read)
            took[index] = min(took[index], time.perf_counter() - began)
    return 2 * 4 * part / min(took) / 1e9


def _rate(product_of: Callable[[int], Callable[[], object]]) -> float:
    """The highest rate of the products of square matrices of several sizes, in TFLOP/s."""
    best = 0.0
    for side in _SIDES:
        took = _seconds(product_of(side))
        best = max(best, 2 * side**3 / took / 1e12)
        if took > _SLOW:
            break
    return best


def _in_torch(dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    def product(side: int) -> Callable[[], object]:
        matrix = torch.ones(side, side, dtype=dtype)
        return functools.partial(torch.mm, matrix, matrix)

    return product


def _int8_product(side: int, threads: int) -> Callable[[], object]:
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array(draw.integers(-64, 64, (side, side), dtype=np.int8), "w")
    inputs = draw.integers(0, 256, (side, side), dtype=np.uint8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    return _run([node], inputs, TensorProto.UINT8, TensorProto.INT32, weight, threads)


def _overheads(threads: int) -> tuple[float, float]:
    """Seconds per call and per operator, from chains of operators on a few numbers."""
    from onnx import TensorProto, helper, numpy_helper

    times = []
    for count in (1, 1 + _CHAINED):
        # two kinds in turn, because ONNX Runtime merges equal ones
        names = ["x", *(f"t{index}" for index in range(1, count)), "y"]
        nodes = [
            helper.make_node(("Add", "Mul")[index % 2], [names[index], "w"], [names[index + 1]])
            for index in range(count)
        ]
        one = numpy_helper.from_array(np.ones(1, np.float32), "w")
        call = _run(nodes, np.ones((1, 8), np.float32), TensorProto.FLOAT, TensorProto.FLOAT, one, threads)
        times.append(_seconds(call))
    operator = max(times[1] - times[0], 0.0) / _CHAINED
    return max(times[0] - operator, 0.0), operator


def _run(
    nodes: list[Any], x: np.ndarray[Any, Any], kind: int, result: int, weight: Any, threads: int
) -> Callable[[], object]:
    """A call of a graph with one input, one weight and one output in ONNX Runtime."""
    import onnxruntime
    from onnx import helper

    shapes = [helper.make_tensor_value_info(name, each, x.shape) for name, each in (("x", kind), ("y", result))]
    graph = helper.make_graph(nodes, "measured", shapes[:1], shapes[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _seconds(call: Callable[[], object]) -> float:
    """The least time of a call; other work on the machine only makes calls slower."""
    call()
    fastest, began, count = math.inf, time.perf_counter(), 0
    while count < _REPEATS or time.perf_counter() - began < _LEAST:
        before = time.perf_counter()
        call()
        fastest, count = min(fastest, time.perf_counter() - before), count + 1
    return fastest
