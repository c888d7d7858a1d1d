"""ONNX Runtime: load an exported file, run it, and count the kernels that were chosen."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.output_tensors import nested

_INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "ConvInteger",
    "MatMulNBits",
)
_FLOAT = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")

ONLY_OUTPUT = "output"
"""Name of the output in the file of a model that returns one tensor; others are named as the model names them."""


class Runtime:
    """A loaded ONNX file; call it with one batch.

    Args:
        session: An ONNX Runtime session with one input.
        threads: Threads per call; None leaves the choice to ONNX Runtime.
    """

    def __init__(self, session: Any, threads: int | None) -> None:
        self.threads = threads
        self._session = session
        self._input: str = session.get_inputs()[0].name

    def __call__(self, x: Tensor) -> Any:
        """The output of the model; several are returned in dicts and tuples, as the model returns them."""
        names = [output.name for output in self._session.get_outputs()]
        values = map(torch.from_numpy, self._session.run(None, {self._input: x.detach().cpu().numpy()}))
        flat = dict(zip(names, values, strict=True))
        return flat[ONLY_OUTPUT] if names == [ONLY_OUTPUT] else nested(flat)


@dataclass(frozen=True)
class Kernels:
    """Number of occurrences of each matrix-product kernel in the graph that the runtime executes."""

    integer: dict[str, int]
    """Integer kernels, such as ``{"QLinearConv": 3, "QGemm": 1}``."""
    floating: dict[str, int]
    """Floating-point kernels, such as ``{"Conv": 1}``; empty if every product is an integer product."""


def load_runtime(path: Path, threads: int | None = None) -> Runtime:
    """Load a ``.onnx`` file into ONNX Runtime on the CPU.

    On x86 processors without VNNI, integer kernels may saturate between two products. The session selects exact
    kernels there (``session.x64quantprecision``), and so should the session that serves the model. On other processors
    the integer kernels are exact, and the option would only halve their speed.

    Args:
        path: The file.
        threads: Threads per call; None leaves the choice to ONNX Runtime.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or ONNX Runtime cannot load it.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.onnx import export_onnx
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     load_runtime(Path(folder) / "model.onnx", threads=1)(x).shape
        torch.Size([3, 4])
    """
    return Runtime(_session(path, threads), threads)


def integer_kernels(path: Path) -> Kernels:
    """Count the kernels of the graph that ONNX Runtime optimized for this machine.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or ONNX Runtime cannot load it.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _session(path, 1, optimized)
        import onnx

        counts = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    return Kernels(
        integer={name: counts[name] for name in _INTEGER if counts[name]},
        floating={name: counts[name] for name in _FLOAT if counts[name]},
    )


def _saturates() -> bool:
    """Whether fast 8-bit products of this processor may overflow 16 bits: x86 without VNNI, or unknown."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def _session(path: Path, threads: int | None, optimized: Path | None = None) -> Any:
    if path.suffix != ".onnx":
        raise QatkitError(
            f"ONNX Runtime does not load '{path.suffix}' files", key=str(path), advice="pass a .onnx file"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise QatkitError("onnxruntime is not installed", advice="run: pip install 'qatkit[onnx]'") from error
    options = onnxruntime.SessionOptions()
    # errors only: it warns that an optimized graph is only for this machine
    options.log_severity_level = 3
    # by default it quantizes the inputs of weight-only products to 8 bits, which training did not do
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    exact = _saturates()
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4  # the first attempt may fail
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)

    def load() -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    try:
        try:
            return load()
        except Exception:
            if not exact:
                raise
            # with exact kernels, ONNX Runtime fails where two calls share a weight; unfused, the graph is exact too
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            return load()
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise QatkitError(f"ONNX Runtime cannot load it: {error}", key=str(path)) from error
