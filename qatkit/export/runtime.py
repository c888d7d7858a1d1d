"""The runtimes that exported files are for: loading one, running it, and seeing which kernels it chose."""

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


class Runtime:
    """A model file in its runtime; call it with one batch.

    Args:
        session: An ONNX Runtime session with one input.
        threads: Threads that one call uses; None is ONNX Runtime's own choice.
    """

    def __init__(self, session: Any, threads: int | None) -> None:
        self.threads = threads
        self._session = session
        self._input: str = session.get_inputs()[0].name

    def __call__(self, x: Tensor) -> Tensor:
        (output,) = self._session.run(None, {self._input: x.detach().cpu().numpy()})
        return torch.from_numpy(output)


@dataclass(frozen=True)
class Kernels:
    """How often each multiplying kernel occurs in the graph that the runtime really executes."""

    integer: dict[str, int]
    """Kernels over codes, such as ``{"QLinearConv": 3, "QGemm": 1}``."""
    floating: dict[str, int]
    """Kernels that stayed in floating point, such as ``{"Conv": 1}``; empty where every product is of integers."""


def load_runtime(path: Path, threads: int | None = None) -> Runtime:
    """Load a ``.onnx`` file into ONNX Runtime on the CPU.

    On x86 processors without VNNI, integer kernels may saturate between two products; the session is told to take the
    exact ones there (``session.x64quantprecision``), and so should the session that serves the model. Elsewhere they
    are exact already, and the option would only halve their speed.

    Args:
        path: The file.
        threads: Threads per call; None leaves the choice to ONNX Runtime.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or the runtime refuses it.

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
    """Count the kernels that ONNX Runtime chose for a file, in the graph as it optimized it on this machine.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or the runtime refuses it.
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
    """Whether this processor's fast 8-bit products may overflow 16 bits: x86 without VNNI, or that does not say."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


def _session(path: Path, threads: int | None, optimized: Path | None = None) -> Any:
    if path.suffix != ".onnx":
        raise QatkitError(f"{path}: no runtime is known for '{path.suffix}' files; give a .onnx file")
    try:
        import onnxruntime
    except ImportError as error:
        raise QatkitError("running ONNX files needs onnxruntime: pip install 'qatkit[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns that an optimized graph is for this machine alone
    # by default it rounds the inputs of products with weights alone to 8 bits, which nobody trained
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise QatkitError(f"{path}: ONNX Runtime cannot load it: {error}") from error
