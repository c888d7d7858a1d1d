"""Run a LiteRT file with ai-edge-litert, in the environment of another interpreter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.export.litert import checker
from qatkit.export.litert.content import Grid
from qatkit.export.onnx.runtime import named_inputs
from qatkit.export.output_tensors import nested
from qatkit.export.separate import SeparateError, SeparateProcess


class LiteRTModel:
    """A process with LiteRT and its default delegate, XNNPACK, and the file that it has loaded.

    Args:
        python: The interpreter of an environment with ai-edge-litert.

    Raises:
        QatkitError: the interpreter does not start, or has no ai-edge-litert.
    """

    def __init__(self, python: Path) -> None:
        self._process = SeparateProcess(python, checker, "litert", "ai-edge-litert")
        self.versions = self._process.versions
        self._temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        self._inputs: list[str] = []
        self._outputs: dict[str, str] = {}

    def close(self) -> None:
        """End the process."""
        self._process.close()
        self._temporary.cleanup()

    def load(self, path: Path, inputs: list[str], outputs: list[str], threads: int | None) -> None:
        """Load a file.

        Args:
            path: The file.
            inputs: The names of the model's inputs, in order.
            outputs: The names of its outputs, in order; "" is the only output of a model that returns one tensor.
            threads: Threads per call; None uses LiteRT's default.

        Raises:
            SeparateError: LiteRT cannot load it.
        """
        names = self._process.ask(op="load", file=str(path.resolve()), threads=threads)
        if set(names["inputs"]) != set(inputs) or len(names["outputs"]) != len(outputs):
            raise SeparateError("its signature does not have the inputs and outputs of the model")
        self._inputs = inputs
        self._outputs = {name or "output": name for name in outputs}

    def tensors(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, tuple[Grid, str]]]:
        """Return all constants, and the quantization and dtype of all tensors, by name, as LiteRT reads them.

        Raises:
            SeparateError: LiteRT cannot read them.
        """
        file = self._folder / "tensors.npz"
        grids = self._process.ask(op="tensors", answer=str(file))["grids"]
        with np.load(file) as constants:
            values = dict(constants)
        return values, {
            name: (Grid(np.array(scales, np.float32), np.array(zero_points, np.int64), axis), dtype)
            for name, (scales, zero_points, axis, dtype) in grids.items()
        }

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """The output of the model; multiple tensors are in dicts and tuples, as in the model's own output.

        Raises:
            QatkitError: an input is missing, or is not in the file.
            SeparateError: LiteRT fails on the inputs.
        """
        tensors = named_inputs(self._inputs, args, kwargs)
        inputs, answer = (self._folder / name for name in ("inputs.npz", "outputs.npz"))
        np.savez(inputs, allow_pickle=False, **{name: value.detach().cpu().numpy() for name, value in tensors.items()})
        self._process.ask(op="run", inputs=str(inputs), answer=str(answer))
        with np.load(answer) as outputs:
            return nested({name: torch.from_numpy(outputs[key]) for key, name in self._outputs.items()})
