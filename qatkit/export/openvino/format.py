"""OpenVINO export: a model in OpenVINO's own format (IR), with integer weights.

The graph is that of the ONNX export (`qatkit.export.onnx`), converted by OpenVINO: constants keep their names and stay
integers, ``{layer}.weight.codes`` in the ``.bin`` file. In weight-only layers of up to 4 bits, two codes share a byte.
OpenVINO runs a layer with integer kernels if its input is quantized and its weight is symmetric and signed;
`qatkit.export.openvino.runtime.openvino_kernels` counts them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from qatkit.common.files import fsync_folder, naming, temporary_path
from qatkit.errors import QatkitError
from qatkit.export.formats import FORMATS
from qatkit.export.interface import ExportContext, PlannedExport, ReadBack
from qatkit.export.onnx import format as onnx
from qatkit.export.onnx.inputs import unknown_inputs
from qatkit.export.onnx.limits import check as check_onnx
from qatkit.export.onnx.saturation import SaturationCheck, saturates
from qatkit.export.openvino.model import read_onnx
from qatkit.export.openvino.runtime import WITHOUT_INTEGERS, read_model, runtime_of
from qatkit.export.openvino.weights import compare_openvino_weights
from qatkit.tasks import Task, model_inputs, task_of

bound = onnx.bound


def check(model: nn.Module, planned: PlannedExport) -> None:
    """Raise an error if a model cannot be exported to OpenVINO. Weights are not read.

    Raises:
        QatkitError: the ONNX export, from which the file is made, does not support a quantized layer; the KV cache or
            the hidden state of a recurrent layer is quantized; or activations are quantized dynamically.
    """
    for name, scheme in planned.schemes.items():
        if scheme.activation is not None and isinstance(model.get_submodule(name), nn.RNNBase):
            raise QatkitError(
                f"layer '{name}': OpenVINO does not support quantized hidden states of recurrent layers",
                advice="exclude the layer, or quantize only its weights",
            )
        if scheme.activation is not None and scheme.activation.scaled_per_batch:
            raise QatkitError(
                f"layer '{name}': OpenVINO runs dynamic activation quantization in floating point",
                advice="set target: openvino, whose activations are static, or exclude the layer",
            )
    try:
        check_onnx(model, planned, packs=False)
    except QatkitError as error:
        raise error.with_fields(problem=f"OpenVINO models are converted from ONNX: {error.problem}") from None


def write(model: nn.Module, path: Path, context: ExportContext) -> None:
    """Trace the model on a test batch and write the files.

    Raises:
        QatkitError: `export_openvino` does not support the model or its inputs.
    """
    args, kwargs = model_inputs(context.batch)
    target = None if context.target is None else context.target.name
    export_openvino(model, kwargs or args, path, task_of(context.batch, context.task), target)


def read_back(model: nn.Module, path: Path, threads: int | None) -> ReadBack:
    """Compare the integers in the files to the model's, and load them into OpenVINO on the CPU, in float32."""
    try:
        read = read_model(path)
    except QatkitError as error:
        return ReadBack(0, [str(error)], None)
    compared = compare_openvino_weights(model, read)
    try:
        runtime = runtime_of(read, threads)
        failures = compared.failures + unknown_inputs(model, runtime.inputs)
        if not (saturates() and compared.at_risk):
            return ReadBack(compared.weights, failures, runtime)
        exact = runtime_of(read, threads, WITHOUT_INTEGERS)
    except QatkitError as error:
        return ReadBack(compared.weights, [*compared.failures, str(error)], None)
    checked = SaturationCheck(runtime, exact, compared.at_risk, "the option LP_TRANSFORMS_MODE: NO, in floating point")
    return ReadBack(compared.weights, failures, checked, checked.failures)


def export_openvino(
    model: nn.Module, example: Any, path: Path | str, task: Task | str | None = None, target: str | None = None
) -> None:
    """Write a plain or fake-quantized model to OpenVINO's format, with a dynamic batch dimension.

    The model is not changed; the files compute the outputs of the model in eval mode. On processors with AMX, OpenVINO
    runs floating-point layers in bfloat16. To reproduce the results of training, compile the model with
    ``{"INFERENCE_PRECISION_HINT": "f32"}``.

    Args:
        model: A plain float32 model, or a calibrated model prepared by `prepare_qat` or `prepare_for_target`.
        example: The inputs of one call, as in `qatkit.export.onnx.format.export_onnx`.
        path: The ``.xml`` file; the weights are written next to it, with the suffix ``.bin``. An interrupted export
            leaves the previous files, or no ``.xml`` file.
        task: As in `export_onnx`.
        target: The processor, "openvino" or "openvino-vnni". With the latter, 8-bit weights stay signed. By default
            they become unsigned, which is exact on every processor, but runs in floating point.

    Raises:
        QatkitError: OpenVINO or ONNX is not installed, the path does not end in ``.xml``, or `export_onnx` does not
            support the model or the example.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.quantization import calibrate, prepare_for_target
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8)
        >>> _ = prepare_for_target(model, "openvino", x)
        >>> _ = calibrate(model, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_openvino(model, x, Path(folder) / "model.xml", target="openvino")
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['model.bin', 'model.xml']
    """
    path = Path(path)
    FORMATS["openvino"].check_packages()
    if path.suffix != ".xml":
        raise QatkitError(
            f"OpenVINO does not load '{path.suffix}' files", key=str(path), advice="use a path that ends in .xml"
        )
    check(model, PlannedExport.of(model))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        onnx.write_graph(model, example, graph, task, target, format="openvino", packs=False)
        _save(read_onnx(graph), path)


def _save(converted: Any, path: Path) -> None:
    """Write both files, or none.

    Two files cannot be replaced at the same time, so the old ``.xml`` file is removed first: at no time is there one
    whose weights are not its own.
    """
    import openvino

    folder, weights = temporary_path(path), path.with_suffix(".bin")
    with naming(path):
        try:
            folder.mkdir()
            openvino.save_model(converted, folder / path.name, compress_to_fp16=False)
            for file in folder.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            path.unlink(missing_ok=True)
            os.replace(folder / weights.name, weights)
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        fsync_folder(path.parent)
