"""What qatkit has to know about an export format: the fields of a row of the table in `qatkit.export.formats`."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qatkit.common.packages import check_packages
from qatkit.common.tables import implementation


@dataclass(frozen=True)
class ExportFormat:
    """A file format for trained models. Functions are referenced as ``module:function``."""

    name: str
    """The name in ``export: {format: NAME}``."""
    description: str
    """One-line description for help texts and docs."""
    file_name: str
    """The file name in a stage's export folder; empty if the format writes the folder itself."""
    check: str
    """``(model, planned)``: raise an error for an unsupported model; called before training and before writing."""
    write: str
    """``(model, path, context)``: write the model. Formats that trace use the batch of the `ExportContext`."""
    read_back: str
    """``(model, path, threads)``: compare the file's weights to the model's, and load the file for verification."""
    bound: str
    """``(measured)``: the output error that verification allows."""
    runtime: str
    """The program that runs the file, as the subject of a sentence: "ONNX Runtime"."""
    weights: str = "weights"
    """The values that verification compares with ``==``: "weights", or "integer weights"."""
    extra: str = ""
    """The optional dependency group: ``pip install 'qatkit[EXTRA]'``."""
    packages: tuple[str, ...] = ()
    """Import names of the packages that the format needs; the report records their versions."""
    recognizes: str = ""
    """``(path)``: whether the content is of this format, if the file name is ambiguous."""
    companions: tuple[str, ...] = ()
    """Files saved next to the weights so that `from_pretrained` loads them: "config", "tokenizer"."""
    own_files: tuple[str, ...] = ()
    """Such files that the format writes in its own form; `read_back` compares them."""
    check_tokenizer: str = ""
    """``(tokenizer)``: raise an error for an unsupported tokenizer, or do nothing for None; called before training."""
    compare_data: str = ""
    """``(path, tokenizer, batch)``: compare the parts of the file that come from the data, such as the tokenizer, and
    return all differences.
    """
    benchmark: str = ""
    """``(path, threads)``: return a callable whose latency the report measures; empty if no latency is measured."""
    baselines: str = ""
    """``(path, batches, folder)``: quantize a floating-point file with the runtime's own PTQ."""
    runtime_module: str = ""
    """Import name of the runtime whose latency is measured."""
    kernels: str = ""
    """``(path)``: return the kernels that the runtime chose; empty if unknown."""
    rounding: str = ""
    """``(model)``: return a float64 copy that rounds like the runtime, whose summation order differs from PyTorch's. If
    inputs are quantized, verification measures the effect. Empty if the runtime computes exactly like PyTorch.
    """
    beside: tuple[str, ...] = ()
    """Globs for additional files that belong to the exported file; ``{stem}`` is its name without the suffix."""
    weight_files: tuple[str, ...] = ("*.safetensors",)
    """Globs of the files that hold the weights in an exported folder."""
    environment: tuple[str, ...] = ()
    """Requirements of a runtime that is not in qatkit's own environment, where it may conflict. `read_back` then has
    one more argument: the interpreter of an environment with these packages, or None.
    """
    generate: str = ""
    """``(path, prompt, tokens, python)``: yield the pieces of a text that continues a prompt, each token the most
    probable one; empty if the format is not for language models. See `qatkit.export.generation`.
    """
    decoder: str = ""
    """``(path, threads)``: return the request with which `qatkit.export.decoder_process` opens a causal language model,
    whose prefill and decode are then timed; empty if they are not.
    """
    not_timed: str = ""
    """Why `qatkit bench` does not measure the speed, if it measures neither latency nor prefill and decode."""
    walk: str = ""
    """``(model, path, runtime)``: return a `Walk` through the layers of a file, which `read_back` loaded as `runtime`;
    empty if the runtime cannot return the outputs of single layers. See `qatkit.export.explanation`.
    """
    dense_bytes: str = ""
    """``(path)``: return the bytes of the same weights in dense storage, for formats that omit zeros."""

    @property
    def is_folder(self) -> bool:
        """Whether the format writes a folder instead of one file."""
        return not self.file_name

    @property
    def suffix(self) -> str:
        """The file extension, such as ".onnx"; empty for a folder."""
        return Path(self.file_name).suffix

    def path(self, folder: Path) -> Path:
        """Return the exported file in a stage's export folder, or the folder itself."""
        return folder / self.file_name if self.file_name else folder

    def folder_of(self, path: Path) -> Path:
        """Return the folder of an exported file and its companions, or the exported folder itself."""
        return path if self.is_folder else path.parent

    def size(self, path: Path) -> int:
        """Size in bytes of an exported file with its additional files, or of the weights in an exported folder."""
        if not self.is_folder:
            return sum(file.stat().st_size for file in (path, *self.files_beside(path)))
        return sum(file.stat().st_size for pattern in self.weight_files for file in path.glob(pattern))

    def files_beside(self, path: Path) -> list[Path]:
        """Return the additional files of an exported file."""
        globs = [pattern.format(stem=glob.escape(path.stem)) for pattern in self.beside]
        return sorted(file for pattern in globs for file in path.parent.glob(pattern))

    @property
    def untimed(self) -> str:
        """Why the speed of a file is not measured, if neither latency nor prefill and decode are."""
        if self.not_timed:
            return self.not_timed
        if self.decoder:
            return "only causal language models are measured in this format"
        return f"speed in {self.runtime.rstrip(',')} is not measured"

    def call(self, part: str, *args: Any) -> Any:
        """Import the function that a field refers to, and call it."""
        return implementation(getattr(self, part))(*args)

    def check_model(
        self, model: Any, schemes: Any = None, kv_cache: bool = False, task: Any = None, linear_codes: bool = False
    ) -> None:
        """Raise an error if the format does not support a model. Weights are not read.

        Args:
            model: A plain model if `schemes` is set, otherwise a model prepared by `prepare_qat`.
            schemes: The planned `Scheme` of each layer, by name. The default is the model's own quantization.
            kv_cache: Whether the KV cache will be quantized; ignored without `schemes`.
            task: The `Task` that the data declares, if it is known.
            linear_codes: Whether the outputs of linear layers will be quantized, too; ignored without `schemes`.

        Raises:
            QatkitError: the format does not support the result; the error includes the layer and the fix.

        Example:
            >>> from torch import nn
            >>> from qatkit import QuantSpec, prepare_qat
            >>> from qatkit.export.formats import FORMATS
            >>> model = nn.Sequential(nn.Linear(4, 4))
            >>> _ = prepare_qat(model, QuantSpec(num_bits=8, type="float"))
            >>> FORMATS["onnx"].check_model(model)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            qatkit.errors.QatkitError: layer '0': ONNX integer QDQ does not support weight quantization with ...
        """
        plan = implementation("qatkit.export.interface:PlannedExport")
        self.call(
            "check", model, plan.of(model, task) if schemes is None else plan(schemes, kv_cache, task, linear_codes)
        )

    def check_packages(self) -> None:
        """Raise an error if a package that the format needs is missing.

        Raises:
            QatkitError: a package is missing; the error includes the command that installs it.
        """
        check_packages(f"format '{self.name}'", self.packages, self.extra)

    def versions(self) -> dict[str, str]:
        """Return the versions of the installed packages that the format needs, by import name."""
        return {name: version(name) for name in self.packages if find_spec(name) is not None}
