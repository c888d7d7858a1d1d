"""Convert an ONNX file to an OpenVINO model with integer constants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qatkit.export.openvino_runtime import OUTPUTS
from qatkit.export.runtime import NAMED, ONLY_OUTPUT

_EXACT_PRODUCTS = (["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"], "0")
"""An option that OpenVINO reads from the file. By default, it quantizes the inputs of layers with integer weights, even
if training did not.
"""
_NUMBERED = re.compile(r"(.+?)_\d+")


def read_onnx(path: Path) -> Any:
    """Read an ONNX file that `export_onnx` has written into an OpenVINO model, which is ready to be saved.

    Args:
        path: The ONNX file.
    """
    import onnx
    import openvino

    model = openvino.Core().read_model(path)
    proto = onnx.load(path, load_external_data=False)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    outputs = [value.name for value in proto.graph.output]
    single = outputs == [ONLY_OUTPUT] and NAMED not in metadata
    model.set_rt_info("\n".join([""] if single else outputs), list(OUTPUTS))
    path_in_file, value = _EXACT_PRODUCTS
    model.set_rt_info(value, path_in_file)
    _number(model)
    return model


def _number(model: Any) -> None:
    """Number the nodes that OpenVINO names by a counter, so that the same model always gives the same files."""
    counts: dict[str, int] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if (found := _NUMBERED.fullmatch(node.get_friendly_name())) is not None and found[1] == kind:
            counts[kind] = counts.get(kind, -1) + 1
            node.set_friendly_name(f"{kind}_{counts[kind]}")
