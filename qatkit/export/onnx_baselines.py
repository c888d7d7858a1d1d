"""ONNX Runtime's own quantization without training, which a trained file has to beat."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.export.runtime import open_session


def baselines(path: Path, batches: Iterable[Tensor | Mapping[str, Tensor]], folder: Path) -> dict[str, Path]:
    """Quantize a floating-point file as `onnxruntime.quantization` does it with its usual settings.

    Models of text (with integer inputs) get `quantize_dynamic`. Others get `quantize_static` with QDQ nodes, one scale
    per output channel, and ranges from the batches.

    Args:
        path: A floating-point ``.onnx`` file.
        batches: Calibration batches: the only input, or inputs by name.
        folder: Where the files are written.

    Returns:
        One file, by the name of the function that made it.

    Raises:
        QatkitError: ONNX Runtime cannot quantize the file.
    """
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    (only, *_) = [value.name for value in open_session(path, 1).get_inputs()]
    named = [{only: batch} if isinstance(batch, Tensor) else batch for batch in batches]
    feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in named]
    of_text = any(np.issubdtype(array.dtype, np.integer) for feed in feeds[:1] for array in feed.values())
    name = "quantize_dynamic" if of_text else "quantize_static"
    made, prepared = folder / f"{name}.onnx", folder / "prepared.onnx"
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends its own preprocessing, which follows, on the root logger
    onnxruntime.set_default_logger_severity(3)
    try:
        # its symbolic shapes do not support newer operators; ONNX's own are enough
        quantization.shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
        if of_text:
            quantization.quantize_dynamic(prepared, made)
        else:
            quantization.quantize_static(
                prepared, made, _Reader(feeds), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        onnx.checker.check_model(made)
    except Exception as error:  # its exceptions share no base class
        reason = str(error).strip().splitlines()
        raise QatkitError(
            f"ONNX Runtime's {name} fails: {reason[0] if reason else type(error).__name__}",
            key=str(path),
            advice="omit --against",
        ) from error
    finally:
        root.setLevel(level)
        onnxruntime.set_default_logger_severity(2)  # the default
    return {name: made}


class _Reader:
    """The calibration batches, as `quantize_static` reads them."""

    def __init__(self, feeds: list[dict[str, np.ndarray[Any, Any]]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Asked for by histogram calibration, which is not used."""
        raise NotImplementedError
