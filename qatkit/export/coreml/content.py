"""Read a Core ML package with coremltools: the constants of the program, stored and decoded."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
PACKAGE = "model.mlpackage"
"""The package in an exported folder."""


@dataclass(frozen=True)
class Constant:
    """A constant of the program."""

    values: Array
    """What coremltools decodes, float32 for weights."""
    codes: Array | None = None
    """The stored codes of a quantized weight."""
    scale: Array | None = None
    offset: Array | None = None
    """The zero points; None for symmetric codes."""


def constant_name(key: str) -> str:
    """Return the name in the program of a parameter of the model.

    Example:
        >>> constant_name("layers.0.weight")
        'model_layers_0_weight'
    """
    return f"model_{key.replace('.', '_')}"


def is_coreml_folder(path: Path) -> bool:
    """Whether a folder holds a Core ML package."""
    return (path / PACKAGE).is_dir()


def quietly_imported(name: str) -> Any:
    """Import coremltools, which logs that Core ML itself is missing."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return import_module(name)
    finally:
        logger.setLevel(level)


def read_constants(folder: Path) -> dict[str, Constant]:
    """Return the constants of the package in a folder by name.

    Raises:
        Exception: coremltools cannot read the package; its exceptions share no base class.
    """
    coremltools = quietly_imported("coremltools")
    load = import_module("coremltools.converters.mil.frontend.milproto.load").load
    package = coremltools.models.MLModel(str(folder / PACKAGE), skip_model_load=True)
    spec = package.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=package.weights_dir)
    found: dict[str, Constant] = {}
    for operation in program.functions["main"].operations:
        name = operation.outputs[0].name
        if operation.op_type == "const":
            found[name] = Constant(np.asarray(operation.outputs[0].val))
        elif operation.op_type == "constexpr_blockwise_shift_scale":
            offset = None if operation.offset is None else np.asarray(operation.offset.val)
            values = np.asarray(operation.materialized_val_inference())
            found[name] = Constant(values, np.asarray(operation.data.val), np.asarray(operation.scale.val), offset)
    return found
