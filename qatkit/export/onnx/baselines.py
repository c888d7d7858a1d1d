"""ONNX Runtime's own quantization without training, which a trained file has to beat."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.onnx.runtime import open_session

Batches = Iterable[Tensor | Mapping[str, Tensor]]
"""Calibration batches: the only input, or inputs by name."""


def baselines(path: Path, batches: Batches, folder: Path) -> dict[str, Path]:
    """Quantize a floating-point file with the function of ONNX Runtime that users would choose.

    It is `quantize_dynamic` for a text model (with integer inputs), and `quantize_static` for any other model.

    Args:
        path: A floating-point ``.onnx`` file.
        batches: Calibration batches.
        folder: Where the file is written.

    Returns:
        One file, by the name of the function.

    Raises:
        QatkitError: ONNX Runtime cannot quantize the file.
    """
    inputs = open_session(path, 1).get_inputs()
    name = "quantize_dynamic" if any("int" in value.type for value in inputs) else "quantize_static"
    made = folder / f"{name}.onnx"
    quantize(name, path, batches, made)
    return {name: made}


def quantize(name: str, path: Path, batches: Batches, made: Path) -> None:
    """Quantize a floating-point file with a function of ONNX Runtime and its usual settings.

    Args:
        name: "quantize_dynamic"; or "quantize_static" with QDQ nodes, one scale per output channel, and ranges from the
            batches.
        path: A floating-point ``.onnx`` file.
        batches: Calibration batches; `quantize_dynamic` reads none.
        made: The quantized file.

    Raises:
        QatkitError: ONNX Runtime cannot quantize the file.
    """
    import onnx
    import onnxruntime
    from onnxruntime import quantization as ort

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends its own preprocessing, which follows, on the root logger
    onnxruntime.set_default_logger_severity(3)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            # its symbolic shapes do not support newer operators; ONNX's own are enough
            ort.shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
            if name == "quantize_dynamic":
                ort.quantize_dynamic(prepared, made)
            else:
                ort.quantize_static(
                    prepared, made, _Reader(path, batches), quant_format=ort.QuantFormat.QDQ, per_channel=True,
                    activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
                )  # fmt: skip
        onnx.checker.check_model(made)
    except Exception as error:  # its exceptions share no base class
        reason = str(error).strip().splitlines()
        raise QatkitError(
            f"{name} fails: {reason[0] if reason else type(error).__name__}",
            key=str(path),
            advice="omit --against",
        ) from error
    finally:
        root.setLevel(level)
        onnxruntime.set_default_logger_severity(2)  # the default


class _Reader:
    """The calibration batches, as `quantize_static` reads them."""

    def __init__(self, path: Path, batches: Batches) -> None:
        first = open_session(path, 1).get_inputs()[0].name
        named = ({first: batch} if isinstance(batch, Tensor) else batch for batch in batches)
        self._feeds = ({name: tensor.numpy() for name, tensor in batch.items()} for batch in named)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)
