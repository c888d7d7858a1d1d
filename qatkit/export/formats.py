"""The table of export formats, shared by recipe schema, validation, pipeline, verification, report and docs.

To add a format, add a module next to this one with its four functions (check, write, read back, bound), or a folder
with such a module `format`, and a row in `FORMATS`. `qatkit.export.interface` has the types of these functions, and
`qatkit.export.format_row` the fields of a row.
"""

from __future__ import annotations

from pathlib import Path

from qatkit.common.tables import Table
from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat

# gptqmodel imports requests, but does not declare it
GPTQMODEL = ("torch==2.13.0", "transformers==5.23.0", "gptqmodel==7.6.0", "optimum==2.3.0", "requests>=2.32")

FORMATS = Table(
    "export format",
    [
        ExportFormat(
            name="onnx",
            description="ONNX with integer weights for ONNX Runtime and OpenVINO",
            file_name="model.onnx",
            check="qatkit.export.onnx.limits:check",
            write="qatkit.export.onnx.format:write",
            read_back="qatkit.export.onnx.format:read_back",
            bound="qatkit.export.onnx.format:bound",
            walk="qatkit.export.onnx.walking:walk",
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
            walk="qatkit.export.dense:walk",
            runtime="PyTorch, reading the dense file,",
            recognizes="qatkit.export.dense:is_dense",
            companions=("config", "tokenizer"),
            generate="qatkit.export.generation:in_transformers",
            decoder="qatkit.export.decoding:in_transformers",
            not_timed="PyTorch computes with the decoded weights, as fast as without quantization",
        ),
        ExportFormat(
            name="sparse",
            description="safetensors without the zeros of pruned weights (bitmask or CSR)",
            file_name="model.sparse.safetensors",
            check="qatkit.export.dense:check",
            write="qatkit.export.sparse:write",
            read_back="qatkit.export.sparse:read_back",
            bound="qatkit.export.dense:bound",
            walk="qatkit.export.dense:walk",
            runtime="PyTorch, reading the sparse file,",
            recognizes="qatkit.export.sparse:is_sparse",
            companions=("config", "tokenizer"),
            dense_bytes="qatkit.export.sparse:dense_bytes",
            not_timed="PyTorch computes with the decoded weights, as fast as without pruning",
        ),
        ExportFormat(
            name="compressed_tensors",
            description="a folder of codes and scales that transformers and vLLM load",
            file_name="",
            check="qatkit.export.compressed.format:check",
            write="qatkit.export.compressed.format:write",
            read_back="qatkit.export.compressed.format:read_back",
            bound="qatkit.export.compressed.format:bound",
            walk="qatkit.export.walking:walk_modules",
            runtime="transformers, reading the compressed folder,",
            extra="llm",
            packages=("transformers", "compressed_tensors"),
            recognizes="qatkit.export.compressed.format:is_model_folder",
            companions=("tokenizer",),
            generate="qatkit.export.generation:in_transformers",
            decoder="qatkit.export.decoding:in_transformers",
        ),
        ExportFormat(
            name="gguf",
            description="one file of trained codes and scales for llama.cpp and Ollama",
            file_name="model.gguf",
            check="qatkit.export.gguf.format:check",
            write="qatkit.export.gguf.format:write",
            read_back="qatkit.export.gguf.format:read_back",
            bound="qatkit.export.gguf.format:bound",
            walk="qatkit.export.dense:walk",
            runtime="transformers, reading the GGUF file,",
            extra="gguf",
            packages=("transformers", "gguf"),
            check_tokenizer="qatkit.export.gguf.tokenizer:check_tokenizer",
            compare_data="qatkit.export.gguf.read_back:compare_data",
            generate="qatkit.export.generation:in_transformers",
            not_timed="llama.cpp is not among the packages of qatkit: run `llama-bench -m FILE`",
        ),
        ExportFormat(
            name="torchao",
            description="a folder of torchao tensors for transformers in PyTorch",
            file_name="",
            check="qatkit.export.torchao_folder:check",
            write="qatkit.export.torchao_folder:write",
            read_back="qatkit.export.torchao_folder:read_back",
            bound="qatkit.export.torchao_folder:bound",
            walk="qatkit.export.walking:walk_modules",
            runtime="torchao in transformers",
            extra="torchao",
            packages=("transformers", "torchao"),
            recognizes="qatkit.export.torchao_folder:is_torchao_folder",
            companions=("tokenizer",),
            generate="qatkit.export.generation:in_transformers",
            decoder="qatkit.export.decoding:in_transformers",
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
            decoder="qatkit.export.decoding:in_genai",
        ),
        ExportFormat(
            name="openvino_genai",
            description="a folder with a decoder and its cache for openvino-genai",
            file_name="",
            check="qatkit.export.openvino_genai.format:check",
            write="qatkit.export.openvino_genai.format:write",
            read_back="qatkit.export.openvino_genai.format:read_back",
            bound="qatkit.export.openvino_genai.format:bound",
            runtime="OpenVINO (with INFERENCE_PRECISION_HINT=f32)",
            weights="integer weights",
            extra="openvino-genai",
            packages=("transformers", "openvino", "openvino_genai", "openvino_tokenizers"),
            recognizes="qatkit.export.openvino_genai.format:is_openvino_genai_folder",
            companions=("generation_config", "tokenizer"),
            check_tokenizer="qatkit.export.openvino_genai.format:check_tokenizer",
            compare_data="qatkit.export.openvino_genai.read_back:compare_data",
            weight_files=("openvino_model.bin",),
            generate="qatkit.export.openvino_genai.generation:generate",
            decoder="qatkit.export.decoding:in_openvino_genai",
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
            decoder="qatkit.export.decoding:in_mlx",
        ),
        ExportFormat(
            name="gptq",
            description="a folder in GPTQ's layout, with the trained codes, for vLLM, SGLang and transformers",
            file_name="",
            check="qatkit.export.gptq.format:check_gptq",
            write="qatkit.export.gptq.format:write_gptq",
            read_back="qatkit.export.gptq.format:read_back_gptq",
            bound="qatkit.export.gptq.format:bound_gptq",
            runtime="gptqmodel",
            recognizes="qatkit.export.gptq.format:is_gptq_folder",
            companions=("tokenizer",),
            environment=GPTQMODEL,
            generate="qatkit.export.gptq.runtime:generate",
            decoder="qatkit.export.decoding:in_gptqmodel",
        ),
        ExportFormat(
            name="awq",
            description="a folder in AWQ's layout, with the trained 4-bit codes, for the same servers as gptq",
            file_name="",
            check="qatkit.export.gptq.format:check_awq",
            write="qatkit.export.gptq.format:write_awq",
            read_back="qatkit.export.gptq.format:read_back_awq",
            bound="qatkit.export.gptq.format:bound_awq",
            runtime="gptqmodel",
            recognizes="qatkit.export.gptq.format:is_awq_folder",
            companions=("tokenizer",),
            environment=GPTQMODEL,
            generate="qatkit.export.gptq.runtime:generate",
            decoder="qatkit.export.decoding:in_gptqmodel",
        ),
        ExportFormat(
            name="litert",
            description="one file with integer weights for LiteRT (TensorFlow Lite) on phones",
            file_name="model.tflite",
            check="qatkit.export.litert.format:check",
            write="qatkit.export.litert.format:write",
            read_back="qatkit.export.litert.format:read_back",
            bound="qatkit.export.litert.format:bound",
            runtime="LiteRT",
            weights="integer weights",
            extra="litert",
            packages=("onnx", "onnxscript", "flatbuffers"),
            rounding="qatkit.export.rounding:with_rounding",
            environment=("ai-edge-litert==2.3.0",),
            not_timed="latency depends on the phone: run `benchmark_model --graph=FILE` on it",
        ),
        ExportFormat(
            name="executorch",
            description="one file with integer weights for ExecuTorch (XNNPACK) on phones",
            file_name="model.pte",
            check="qatkit.export.executorch.format:check",
            write="qatkit.export.executorch.format:write",
            read_back="qatkit.export.executorch.format:read_back",
            bound="qatkit.export.executorch.format:bound",
            runtime="ExecuTorch",
            weights="integer weights",
            extra="executorch",
            packages=("executorch",),
            rounding="qatkit.export.rounding:with_rounding",
        ),
        ExportFormat(
            name="coreml",
            description="a folder with a Core ML package of integer weights for Apple's devices, converted but not run",
            file_name="",
            check="qatkit.export.coreml.format:check",
            write="qatkit.export.coreml.format:write",
            read_back="qatkit.export.coreml.format:read_back",
            bound="qatkit.export.coreml.format:bound",
            runtime="Core ML",
            weights="integer weights",
            extra="coreml",
            packages=("coremltools",),
            recognizes="qatkit.export.coreml.content:is_coreml_folder",
            weight_files=("model.mlpackage/**/*.bin", "model.mlpackage/**/*.mlmodel"),
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
