"""Convert an ONNX file to an OpenVINO model with integer constants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qatkit.errors import QatkitError
from qatkit.export.onnx.runtime import NAMED, ONLY_OUTPUT
from qatkit.export.openvino.runtime import OUTPUTS, core

_EXACT_PRODUCTS = (["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"], "0")
"""An option that OpenVINO reads from the file. By default, it quantizes the inputs of layers with integer weights, even
if training did not.
"""
_REDUCTIONS = {
    "ReduceMean": "reduce_mean",
    "ReduceSum": "reduce_sum",
    "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min",
}
_NUMBERED = re.compile(r"(.+?)_\d+")


def read_onnx(path: Path) -> Any:
    """Convert an ONNX file written by `export_onnx` to an OpenVINO model that is ready to be saved.

    Args:
        path: The ONNX file.

    Raises:
        QatkitError: OpenVINO does not support an operator of the graph.
    """
    import onnx

    try:
        model = core().read_model(path)
    except Exception as error:  # openvino's exceptions share no base class
        lines = [line for line in str(error).splitlines() if line.startswith("-- ")] or str(error).splitlines()[-1:]
        raise QatkitError(
            f"OpenVINO cannot convert the model: {' '.join(lines)}", advice="use export: {format: onnx}"
        ) from error
    proto = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    outputs = [value.name for value in proto.graph.output]
    single = outputs == [ONLY_OUTPUT] and NAMED not in metadata
    model.set_rt_info("\n".join([""] if single else outputs), list(OUTPUTS))
    path_in_file, value = _EXACT_PRODUCTS
    model.set_rt_info(value, path_in_file)
    _keep_reduced(model)
    _number(model)
    return model


def _keep_reduced(model: Any) -> None:
    """Let reductions keep their dimensions, which are removed afterwards.

    OpenVINO 2026.4 otherwise fuses a following quantizer into the reduction with scales of the wrong dimension.
    """
    from openvino import Type, opset13

    for node in model.get_ordered_ops():
        make = _REDUCTIONS.get(node.get_type_name())
        if make is None or node.get_attributes()["keep_dims"] or node.get_element_type() != Type.f32:
            continue
        x, axes = (value.get_source_output() for value in node.inputs())
        kept = getattr(opset13, make)(x, axes, keep_dims=True)
        squeezed = opset13.squeeze(kept, axes)
        squeezed.output(0).set_names(node.output(0).names)
        for value in node.output(0).get_target_inputs():
            value.replace_source_output(squeezed.output(0))
        kept.set_friendly_name(node.get_friendly_name())
        squeezed.set_friendly_name(f"{node.get_friendly_name()}.squeezed")


def _number(model: Any) -> None:
    """Number the nodes that OpenVINO names by a counter, so that the same model always gives the same files."""
    counts: dict[str, int] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if (found := _NUMBERED.fullmatch(node.get_friendly_name())) is not None and found[1] == kind:
            counts[kind] = counts.get(kind, -1) + 1
            node.set_friendly_name(f"{kind}_{counts[kind]}")
