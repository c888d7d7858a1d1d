"""Open an exported language model in a process of its own, and time its prefill and its decode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qatkit.export import decoder_process
from qatkit.export.format_row import ExportFormat
from qatkit.export.separate import SeparateError, SeparateProcess


class Decoder:
    """A process with a language model whose time is measured. Call `close` at the end.

    Args:
        row: The format.
        path: The exported file or folder.
        threads: Number of threads that the runtime uses; MLX chooses its own.
        python: The interpreter of an environment with the runtime, for formats that need one.

    Raises:
        QatkitError: the interpreter does not start.
        SeparateError: the runtime cannot open the file.
    """

    def __init__(self, row: ExportFormat, path: Path, threads: int, python: Path | None = None) -> None:
        own = Path(sys.executable) if python is None else python
        request: dict[str, Any] = row.call("decoder", path, threads)
        self.runtime: str = request["runtime"]
        self._process = SeparateProcess(own, decoder_process, row.name, self.runtime)
        try:
            answer = self._process.ask(op="load", threads=threads, **request)
        except SeparateError:
            self._process.close()
            raise
        self.load_seconds: float = answer["seconds"]
        self.versions: dict[str, str] = answer["versions"]
        self.close: Callable[[], None] = self._process.close

    def time(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        """Continue a prompt greedily, and return the seconds until the first new token and those of the other ones.

        Args:
            prompt: Token IDs.
            new_tokens: The number of new tokens, at least 2. Tokens that end a text do not end it.

        Raises:
            SeparateError: the runtime fails.
        """
        found = self._process.ask(op="time", ids=list(prompt), new=new_tokens)
        return found["first"], found["rest"]

    def peak_bytes(self) -> int | None:
        """Return the largest growth of the process's resident memory since the runtime was imported.

        None if the system has no ``/proc``.
        """
        peak: int | None = self._process.ask(op="memory")["peak"]
        return peak


def in_transformers(path: Path, threads: int) -> dict[str, Any]:
    """The request that opens a folder with transformers."""
    return {"runtime": "transformers", "path": _folder(path)}


def in_gptqmodel(path: Path, threads: int) -> dict[str, Any]:
    """The request that opens a folder with transformers and gptqmodel."""
    from qatkit.export.gptq import checker

    return {"runtime": "gptqmodel", "path": _folder(path), "checker": checker.__file__}


def in_genai(path: Path, threads: int) -> dict[str, Any]:
    """The request that opens a folder with onnxruntime-genai."""
    return {"runtime": "onnxruntime-genai", "path": _folder(path)}


def in_openvino_genai(path: Path, threads: int) -> dict[str, Any]:
    """The request that opens a folder with openvino-genai, with the options of verification."""
    from qatkit.export.openvino_genai.read_back import pipeline_options

    return {"runtime": "openvino-genai", "path": _folder(path), "options": pipeline_options(threads)}


def in_mlx(path: Path, threads: int) -> dict[str, Any]:
    """The request that opens a folder with mlx-lm."""
    return {"runtime": "mlx-lm", "path": _folder(path)}


def _folder(path: Path) -> str:
    return str((path if path.is_dir() else path.parent).resolve())
