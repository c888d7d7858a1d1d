"""The table of export formats, shared by recipe schema, validation, pipeline, verification, report and docs.

To add a format, add a module next to this one with its four functions (check, write, read back, bound), or a folder
with such a module `format`, and a row in `FORMATS`. The types of these functions are in `qatkit.export.interface`.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qatkit.common.packages import check_packages
from qatkit.common.tables import Table, implementation
from qatkit.errors import QatkitError


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
    """Requirements of a runtime that conflicts with qatkit's own packages. `read_back` then has one more argument: the
    interpreter of an environment with these packages, or None.
    """
    generate: str = ""
    """``(path, prompt, tokens, python)``: yield the pieces of a text that continues a prompt, each token the most
    probable one; empty if the format is not for language models. See `qatkit.export.generation`.
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

    def call(self, part: str, *args: Any) -> Any:
        """Import the function that a field refers to, and call it."""
        return implementation(getattr(self, part))(*args)

    def check_model(self, model: Any, schemes: Any = None, kv_cache: bool = False, task: Any = None) -> None:
        """Raise an error if the format does not support a model. Weights are not read.

        Args:
            model: A plain model if `schemes` is set, otherwise a model prepared by `prepare_qat`.
            schemes: The planned `Scheme` of each layer, by name. The default is the model's own quantization.
            kv_cache: Whether the KV cache will be quantized; ignored without `schemes`.
            task: The `Task` that the data declares, if it is known.

        Raises:
            QatkitError: the format does not support the result; the error includes the layer and the fix.

        Example:
            >>> from torch import nn
            >>> from qatkit import QuantSpec, prepare_qat
            >>> model = nn.Sequential(nn.Linear(4, 4))
            >>> _ = prepare_qat(model, QuantSpec(num_bits=8, type="float"))
            >>> FORMATS["onnx"].check_model(model)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            qatkit.errors.QatkitError: layer '0': ONNX integer QDQ does not support weight quantization with ...
        """
        plan = implementation("qatkit.export.interface:PlannedExport")
        self.call("check", model, plan.of(model, task) if schemes is None else plan(schemes, kv_cache, task))

    def check_packages(self) -> None:
        """Raise an error if a package that the format needs is missing.

        Raises:
            QatkitError: a package is missing; the error includes the command that installs it.
        """
        check_packages(f"format '{self.name}'", self.packages, self.extra)

    def versions(self) -> dict[str, str]:
        """Return the versions of the installed packages that the format needs, by import name."""
        return {name: version(name) for name in self.packages if find_spec(name) is not None}


FORMATS = Table(
    "export format",
    [
        ExportFormat(
            name="onnx",
            description="ONNX with integer weights for ONNX Runtime and OpenVINO",
            file_name="model.onnx",
            check="qatkit.export.onnx.format:check",
            write="qatkit.export.onnx.format:write",
            read_back="qatkit.export.onnx.format:read_back",
            bound="qatkit.export.onnx.format:bound",
            runtime="ONNX Runtime",
            weights="integer weights",
            extra="onnx",
            packages=("onnx", "onnxscript", "onnxruntime"),
            benchmark="qatkit.export.onnx.runtime:load_runtime",
            baselines="qatkit.export.onnx.baselines:baselines",
            runtime_module="onnxruntime",
            kernels="qatkit.export.onnx.runtime:integer_kernels",
            rounding="qatkit.export.rounding:with_rounding",
            beside=(f"{{stem}}.{'[0-9a-f]' * 8}.onnx.data",),
        ),
        ExportFormat(
            name="openvino",
            description="OpenVINO's own format (IR) with integer weights",
            file_name="model.xml",
            check="qatkit.export.openvino.format:check",
            write="qatkit.export.openvino.format:write",
            read_back="qatkit.export.openvino.format:read_back",
            bound="qatkit.export.openvino.format:bound",
            runtime="OpenVINO (with INFERENCE_PRECISION_HINT=f32)",
            weights="integer weights",
            extra="openvino",
            packages=("onnx", "onnxscript", "openvino"),
            benchmark="qatkit.export.openvino.runtime:load_openvino",
            runtime_module="openvino",
            kernels="qatkit.export.openvino.runtime:openvino_kernels",
            rounding="qatkit.export.openvino.rounding:with_openvino_rounding",
            beside=("{stem}.bin",),
        ),
        ExportFormat(
            name="dense",
            description="safetensors with quantized values under plain names, for any PyTorch code",
            file_name="model.safetensors",
            check="qatkit.export.dense:check",
            write="qatkit.export.dense:write",
            read_back="qatkit.export.dense:read_back",
            bound="qatkit.export.dense:bound",
            runtime="PyTorch, reading the dense file,",
            recognizes="qatkit.export.dense:is_dense",
            companions=("config", "tokenizer"),
            generate="qatkit.export.generation:in_transformers",
        ),
        ExportFormat(
            name="sparse",
            description="safetensors without the zeros of pruned weights (bitmask or CSR)",
            file_name="model.sparse.safetensors",
            check="qatkit.export.dense:check",
            write="qatkit.export.sparse:write",
            read_back="qatkit.export.sparse:read_back",
            bound="qatkit.export.dense:bound",
            runtime="PyTorch, reading the sparse file,",
            recognizes="qatkit.export.sparse:is_sparse",
            companions=("config", "tokenizer"),
            dense_bytes="qatkit.export.sparse:dense_bytes",
        ),
        ExportFormat(
            name="compressed_tensors",
            description="a folder of codes and scales that transformers and vLLM load",
            file_name="",
            check="qatkit.export.compressed.format:check",
            write="qatkit.export.compressed.format:write",
            read_back="qatkit.export.compressed.format:read_back",
            bound="qatkit.export.compressed.format:bound",
            runtime="transformers, reading the compressed folder,",
            extra="llm",
            packages=("transformers", "compressed_tensors"),
            recognizes="qatkit.export.compressed.format:is_model_folder",
            companions=("tokenizer",),
            generate="qatkit.export.generation:in_transformers",
        ),
        ExportFormat(
            name="gguf",
            description="one file of trained codes and scales for llama.cpp and Ollama",
            file_name="model.gguf",
            check="qatkit.export.gguf.format:check",
            write="qatkit.export.gguf.format:write",
            read_back="qatkit.export.gguf.format:read_back",
            bound="qatkit.export.gguf.format:bound",
            runtime="transformers, reading the GGUF file,",
            extra="gguf",
            packages=("transformers", "gguf"),
            check_tokenizer="qatkit.export.gguf.tokenizer:check_tokenizer",
            compare_data="qatkit.export.gguf.read_back:compare_data",
            generate="qatkit.export.generation:in_transformers",
        ),
        ExportFormat(
            name="torchao",
            description="a folder of torchao tensors for transformers in PyTorch",
            file_name="",
            check="qatkit.export.torchao_folder:check",
            write="qatkit.export.torchao_folder:write",
            read_back="qatkit.export.torchao_folder:read_back",
            bound="qatkit.export.torchao_folder:bound",
            runtime="torchao in transformers",
            extra="torchao",
            packages=("transformers", "torchao"),
            recognizes="qatkit.export.torchao_folder:is_torchao_folder",
            companions=("tokenizer",),
            generate="qatkit.export.generation:in_transformers",
        ),
        ExportFormat(
            name="onnx_genai",
            description="a folder with a decoder and its cache for onnxruntime-genai",
            file_name="",
            check="qatkit.export.genai.format:check",
            write="qatkit.export.genai.format:write",
            read_back="qatkit.export.genai.format:read_back",
            bound="qatkit.export.genai.format:bound",
            runtime="onnxruntime-genai",
            weights="integer weights",
            extra="genai",
            packages=("transformers", "onnx", "onnx_ir", "onnxruntime_genai"),
            recognizes="qatkit.export.genai.format:is_genai_folder",
            companions=("tokenizer",),
            check_tokenizer="qatkit.export.genai.format:check_tokenizer",
            compare_data="qatkit.export.genai.runtime:compare_data",
            weight_files=("model.onnx", "model.onnx.data"),
            generate="qatkit.export.generation:in_genai",
        ),
        ExportFormat(
            name="mlx",
            description="a folder of trained codes and scales for MLX on Apple silicon",
            file_name="",
            check="qatkit.export.mlx.format:check",
            write="qatkit.export.mlx.format:write",
            read_back="qatkit.export.mlx.format:read_back",
            bound="qatkit.export.mlx.format:bound",
            runtime="MLX",
            recognizes="qatkit.export.mlx.content:is_mlx_folder",
            companions=("tokenizer",),
            own_files=("config",),
            environment=("mlx==0.32.4", "mlx-cpu==0.32.4; sys_platform == 'linux'", "mlx-lm==0.32.2"),
            generate="qatkit.export.mlx.generation:in_mlx",
        ),
    ],
)


def format_of_path(path: Path, name: str | None = None) -> ExportFormat:
    """Return the format of an exported file or folder.

    Args:
        path: The file or folder.
        name: The format's name. By default, it is inferred from the file name, or from the content if multiple formats
            share the file name.

    Raises:
        QatkitError: the file does not exist, the name is unknown, or the format is ambiguous.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "model.onnx").write_bytes(b"")
        ...     format_of_path(Path(folder) / "model.onnx").name
        'onnx'
    """
    if name is not None:
        row = FORMATS.row(name, key="format")
        if not path.exists():
            raise QatkitError("there is no such file or folder", key=str(path), advice=_EXPORT)
        return row
    rows = [row for row in FORMATS.values() if row.suffix == path.suffix or (row.is_folder and path.is_dir())]
    if not path.exists() and rows:
        raise QatkitError("there is no such file or folder", key=str(path), advice=_EXPORT)
    rows = [row for row in rows if row.is_folder == path.is_dir()]
    if not rows:
        suffixes = sorted({row.suffix for row in FORMATS.values() if row.suffix})
        raise QatkitError(
            f"no export format writes '{path.suffix}' files",
            key=str(path),
            advice=f"pass a folder, or a file that ends in {' or '.join(suffixes)}",
        )
    matching = [row for row in rows if not row.recognizes or row.call("recognizes", path)]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(repr(row.name) for row in matching or rows)
    problem = "several export formats match" if matching else "the content matches no export format"
    raise QatkitError(problem, key=str(path), advice=f"pass format=: one of {names}")


_EXPORT = "export the model first"
