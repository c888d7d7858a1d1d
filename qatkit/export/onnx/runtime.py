"""ONNX Runtime: load an exported file, run it, and count the kernels that were chosen."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.onnx.constants import all_nodes
from qatkit.export.onnx.kernel_reasons import float_reasons
from qatkit.export.output_tensors import nested
from qatkit.quantization.layers import QATLayer

_INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeLSTM",
)
_FLOAT = (
    "Conv",
    "FusedConv",
    "NhwcFusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
)
_PACKED = "MatMulNBits"

ONLY_OUTPUT = "output"
"""Name of the output of a model that returns one tensor; other outputs keep the model's names."""
NAMED = "qatkit.named_output"
"""Metadata key that marks a model whose only output is in a mapping, under the name `ONLY_OUTPUT`."""

_WITHOUT_BFLOAT16 = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


def check_dtypes(model: nn.Module) -> None:
    """Raise an error if a bfloat16 layer has no bfloat16 kernel on CPUs.

    Raises:
        QatkitError: there is such a layer; quantized layers have checks of their own.
    """
    for name, layer in model.named_modules():
        dtypes = {parameter.dtype for parameter in layer.parameters(recurse=False)}
        multiplies = isinstance(layer, _WITHOUT_BFLOAT16) or type(layer).__name__ == "Conv1D"  # transformers'
        if multiplies and torch.bfloat16 in dtypes and not isinstance(layer, QATLayer):
            raise QatkitError(
                f"layer '{name}': ONNX Runtime has no bfloat16 kernel for {type(layer).__name__} on CPUs",
                advice="export model.half() or model.float(), or call .float() on the layer and its input",
            )


class Runtime:
    """A loaded ONNX file, called with one batch in the same way as the model.

    Args:
        session: An ONNX Runtime session.
        added: Names of outputs that the model itself does not have.
    """

    def __init__(self, session: Any, added: Collection[str] = ()) -> None:
        self._session = session
        self.inputs = [value.name for value in session.get_inputs()]
        self._all = [value.name for value in session.get_outputs()]
        self._outputs = [name for name in self._all if name not in added]
        self._single = self._outputs == [ONLY_OUTPUT] and NAMED not in session.get_modelmeta().custom_metadata_map

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Any:
        """The output of the model; multiple tensors are in dicts and tuples, as in the model's own output.

        Raises:
            QatkitError: an input is missing, differs from the file in dtype or size, or is not in the file.
        """
        return self.named_outputs(self.compute(named_inputs(self.inputs, args, kwargs)))

    def compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all outputs of the session by name.

        Raises:
            QatkitError: an input differs from the file in dtype or size.
        """
        try:
            named = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
            computed = self._session.run(None, named)
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise QatkitError(
                f"ONNX Runtime fails on these inputs: {error}",
                advice="pass tensors with the dtypes and sizes of the example with which the model was exported",
            ) from error
        return dict(zip(self._all, map(torch.from_numpy, computed), strict=True))

    def named_outputs(self, flat: Mapping[str, Tensor]) -> Any:
        """Return the result of a call in the form of the model's own output."""
        return flat[ONLY_OUTPUT] if self._single else nested({name: flat[name] for name in self._outputs})


def named_inputs(
    names: Sequence[str], args: Sequence[Tensor], kwargs: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return the inputs of a loaded file by name, for a call with the model's own arguments.

    Raises:
        QatkitError: an input is missing, or is not in the file.
    """
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    tensors = {name: value for name, value in given.items() if value is not None}
    if len(args) > len(names) or tensors.keys() != set(names):
        raise QatkitError(
            f"the exported model expects {', '.join(names)}, but {', '.join(tensors) or 'nothing'} was passed"
            + (f" in {len(args)} positional arguments" if len(args) > len(names) else ""),
            advice="pass the same inputs as in the example with which the model was exported",
        )
    return tensors


@dataclass(frozen=True)
class Kernels:
    """Number of occurrences of each matrix-product kernel in the graph that the runtime executes."""

    integer: dict[str, int]
    """Counts of integer kernels, such as ``{"QLinearConv": 3, "QGemm": 1}``."""
    floating: dict[str, int]
    """Counts of floating-point kernels, such as ``{"Conv": 1}``; empty if all matrix products are integer."""
    reasons: dict[str, list[str]] = field(default_factory=dict)
    """Layers that run in floating point, by reason, such as ``{"the input is not quantized": ["head"]}``."""
    weight_only: dict[str, int] = field(default_factory=dict)
    """Counts of kernels that decode packed weights and compute in floating point, such as ``{"MatMulNBits": 4}``."""


def load_runtime(path: Path | str, threads: int | None = None) -> Runtime:
    """Load a ``.onnx`` file into ONNX Runtime on the CPU.

    The session sets no options that change results: its outputs equal the outputs of a plain
    ``InferenceSession(path)``.

    Args:
        path: The file.
        threads: Threads per call; None uses the default of ONNX Runtime.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or ONNX Runtime cannot load it.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.onnx.format import export_onnx
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(3, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     load_runtime(Path(folder) / "model.onnx", threads=1)(x).shape
        torch.Size([3, 4])
    """
    return Runtime(open_session(Path(path), threads))


def integer_kernels(path: Path) -> Kernels:
    """Count the kernels in the graph that ONNX Runtime optimizes for this machine.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or ONNX Runtime cannot load it.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, 1, optimized)
        import onnx

        nodes = list(all_nodes(onnx.load(optimized, load_external_data=False).graph))
    counts = Counter(node.op_type for node in nodes)
    quantizing = sum(_quantizes_input(node) for node in nodes if node.op_type == _PACKED)
    integer = {name: counts[name] for name in _INTEGER if counts[name]}
    return Kernels(
        integer=integer | ({_PACKED: quantizing} if quantizing else {}),
        floating={name: counts[name] for name in _FLOAT if counts[name]},
        reasons=float_reasons(path, [node for node in nodes if node.op_type in _FLOAT]),
        weight_only={_PACKED: counts[_PACKED] - quantizing} if counts[_PACKED] > quantizing else {},
    )


def _quantizes_input(node: Any) -> bool:
    """Whether a MatMulNBits node quantizes its input to 8 bits."""
    return any(attribute.name == "accuracy_level" and attribute.i == 4 for attribute in node.attribute)


def open_session(
    path: Path,
    threads: int | None,
    optimized: Path | None = None,
    entries: dict[str, str] | None = None,
    content: bytes | None = None,
) -> Any:
    """Open an ONNX Runtime session on the CPU.

    Args:
        path: The ``.onnx`` file.
        threads: Threads per call; None uses the default of ONNX Runtime.
        optimized: Output path for the optimized graph; None does not write it.
        entries: Session config entries that differ from the defaults.
        content: A changed copy of the file to load in its place.

    Raises:
        QatkitError: ONNX Runtime is not installed, the file is not ONNX, or ONNX Runtime cannot load it.
    """
    if path.suffix != ".onnx":
        raise QatkitError(
            f"ONNX Runtime does not load '{path.suffix}' files", key=str(path), advice="pass a .onnx file"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise QatkitError("onnxruntime is not installed", advice="run: pip install 'qatkit[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns that an optimized graph is only for this machine
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return onnxruntime.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise QatkitError(f"ONNX Runtime cannot load it: {error}", key=str(path)) from error
