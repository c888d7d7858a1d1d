"""Operators of ONNX Runtime's own domain, which `onnx` does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def contributed(
    name: str,
    inputs: Sequence[str],
    optional: Sequence[str],
    integers: Sequence[str],
    strings: Sequence[str] = (),
    outputs: Sequence[str] = ("Y",),
) -> Any:
    """Return an operator that translations for `torch.onnx.export` can call.

    Args:
        name: The operator in the domain ``com.microsoft``.
        inputs: Names of its inputs.
        optional: Names of the inputs that may be None, which come last.
        integers: Names of its integer attributes.
        strings: Names of its text attributes.
        outputs: Names of its outputs.
    """
    import onnxscript
    from onnx.defs import OpSchema

    kinds, types = OpSchema.FormalParameterOption, OpSchema.AttrType
    single = [OpSchema.FormalParameter(key, "T", param_option=kinds.Single) for key in inputs]
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[*single, *(OpSchema.FormalParameter(key, "T", param_option=kinds.Optional) for key in optional)],
        outputs=[OpSchema.FormalParameter(key, "T") for key in outputs],
        type_constraints=[("T", [f"tensor({dtype})" for dtype in ("float", "uint8", "int8", "int32", "int64")], "")],
        attributes=[
            *(OpSchema.Attribute(key, types.INT, required=False) for key in integers),
            *(OpSchema.Attribute(key, types.STRING, required=False) for key in strings),
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, schema)
