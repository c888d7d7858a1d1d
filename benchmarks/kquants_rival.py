"""llama.cpp itself: its quantization with an importance matrix, and the loss of a file in its runtime.

Both come from the libraries of the npm package node-llama-cpp, so nothing is built.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

Pointer = ctypes.POINTER(ctypes.c_float)


class Rival:
    """llama.cpp's quantization functions.

    Args:
        folder: A folder in which ``npm install -E node-llama-cpp@3.21.1`` was run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        libraries = folder / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
        self.library = ctypes.CDLL(str(libraries / "libggml-base.so"))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, Pointer, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Pointer
        ]  # fmt: skip

    def quantized(self, weight: Tensor, kind: str, importance: Tensor) -> Tensor:
        """The values of a weight ``[out, in]`` after llama.cpp's quantization, with the importance ``[in]``."""
        rows, columns = weight.shape
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        source = np.ascontiguousarray(weight.detach().float().numpy())
        weights = np.ascontiguousarray(importance.float().numpy())
        stored: Any = np.zeros((rows, columns // block * size), dtype=np.uint8)
        written = self.library.ggml_quantize_chunk(
            gguf.GGMLQuantizationType[kind].value, source.ctypes.data_as(Pointer), stored.ctypes.data, 0, rows,
            columns, weights.ctypes.data_as(Pointer),
        )  # fmt: skip
        assert written == stored.size
        return torch.from_numpy(np.array(dequantize(stored, gguf.GGMLQuantizationType[kind])))

    def losses(self, paths: Sequence[Path], rows: Tensor) -> list[float]:
        """The mean next-token loss of GGUF files on token IDs ``[rows, tokens]``."""
        with tempfile.TemporaryDirectory() as name:
            jobs, results = Path(name) / "jobs.json", Path(name) / "results.json"
            jobs.write_text(json.dumps([{"path": str(path), "rows": rows.tolist()} for path in paths]))
            script = Path(__file__).with_suffix("").with_name("kquants.mjs")
            subprocess.run(["node", str(script), str(jobs), str(results)], cwd=self.folder, check=True)
            found: list[float] = json.loads(results.read_text())
        return found
