"""Run a ``.pte`` file with ExecuTorch's runtime."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from qatkit.export.executorch.content import Content
from qatkit.export.interface import InputError
from qatkit.export.onnx.runtime import named_inputs
from qatkit.export.output_tensors import nested


class ExecuTorchError(Exception):
    """ExecuTorch cannot load or run a file."""


class ExecuTorchModel:
    """A file that ExecuTorch has loaded.

    Args:
        path: The file.
        content: Its content.
        threads: Threads per call; None uses ExecuTorch's default.

    Raises:
        ExecuTorchError: ExecuTorch cannot load it.
    """

    def __init__(self, path: Path, content: Content, threads: int | None) -> None:
        self._content = content
        with _reasons(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "this API is experimental"
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification

            if threads is not None:
                portable_lib._unsafe_reset_threadpool(threads)
            self._data = path.read_bytes()  # ExecuTorch neither copies the bytes nor keeps them or the program alive
            self._program = Runtime.get().load_program(self._data, verification=Verification.InternalConsistency)
            self._method = self._program.load_method("forward")
            meta = self._method.metadata
            self._largest = [meta.input_tensor_meta(index).sizes() for index in range(meta.num_inputs())]

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """The output of the model; multiple tensors are in dicts and tuples, as in the model's own output.

        Raises:
            InputError: an input is larger than in the example with which the file was written.
            QatkitError: an input is missing, or is not in the file.
            ExecuTorchError: ExecuTorch fails on the inputs.
        """
        tensors = named_inputs(self._content.inputs, args, kwargs)
        for name, largest in zip(self._content.inputs, self._largest, strict=True):
            sizes = tensors[name].shape
            if len(sizes) == len(largest) and any(size > most for size, most in zip(sizes, largest, strict=True)):
                raise InputError(
                    f"input '{name}' is {list(sizes)}, but the file accepts at most {list(largest)}, the sizes with "
                    "which it was written",
                    advice="pass smaller batches, or export with the largest batch first",
                )
        with _reasons():
            outputs = self._method.execute([tensors[name].detach().cpu().contiguous() for name in self._content.inputs])
        return nested({name: output.clone() for name, output in zip(self._content.outputs, outputs, strict=True)})


@contextmanager
def _reasons() -> Iterator[None]:
    """Raise errors of ExecuTorch with their reason, which the library prints to standard error."""
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            log.seek(0)
            said = log.read().decode(errors="replace").splitlines()
            reason = next((f": {line}" for line in said if line and not line.startswith("[cpuinfo")), "")
            raise ExecuTorchError(f"{error}{reason}") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
