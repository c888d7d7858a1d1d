"""Whether a file computes what training computed: read back from disk and run in the runtime it was written for.

Nothing of the exporter is used here. The codes are read by the file format's own library, the weights are decoded by the
runtime's own operator, and the expected values come from the model through `qatkit.quantization.arithmetic`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.dense import dense_state
from qatkit.export.onnx_file import check_onnx_weights
from qatkit.export.runtime import load_runtime
from qatkit.quantization.prepare import qat_layers, strip_qat


@dataclass(frozen=True)
class Verification:
    """What was compared, and what differed. A failed check raises nothing; `passed` says it."""

    passed: bool
    failures: list[str]
    """What differs, in words; empty where the file computes what was trained."""
    format: str
    """"onnx" or "dense"."""
    layers: int
    """Quantized layers whose integer codes (onnx) or weights (dense) were compared."""
    weights: int
    """Numbers in them."""
    samples: int
    """Samples that both models answered."""
    bound: str
    """What `mean_error` may be, in words."""
    allowed_error: float
    mean_error: float | None
    """Mean of ``|runtime - trained|`` over all outputs; None where the file did not run."""
    max_error: float | None
    quantization_error: float
    """Mean of ``|trained - the same weights without rounding|``."""
    agreement: float | None
    """Share of samples for which both name the same class."""
    accuracy_trained: float
    accuracy_runtime: float | None

    def summary(self) -> str:
        """The result in one line."""
        if not self.passed:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            return f"FAILED: {self.failures[0]}{more}"
        return (
            f"passed: {self.weights} weights of {self.layers} quantized layers are the trained ones; over {self.samples} "
            f"samples the outputs differ by {self.mean_error:.2g} on average (allowed {self.allowed_error:.2g}, "
            f"quantization itself {self.quantization_error:.2g}) and the accuracy is {self.accuracy_runtime:.4f} "
            f"(trained {self.accuracy_trained:.4f})"
        )


def verify(
    model: nn.Module, path: Path, batches: Iterable[tuple[Tensor, Tensor]], threads: int | None = None
) -> Verification:
    """Compare an exported file with the model it was made from.

    Weights: every integer code, scale and zero point in the file, and the weights the runtime decodes from them, must
    equal the model's (``==``); integer biases must be the nearest whole multiples of their scale. Outputs: where inputs of
    layers are quantized, the mean difference must stay within 1 % of the quantization error (another order of summation
    may move a value across a rounding border); elsewhere within 1e-4 of the mean output.

    Args:
        model: What was exported: plain, or prepared and calibrated. Left as it is.
        path: A ``.onnx`` or ``.safetensors`` file.
        batches: Inputs and class labels, ``[batch, ...]`` and ``[batch]``.
        threads: Threads of the runtime; None leaves the choice to it.

    Returns:
        The comparison. Differences are listed, never raised.

    Raises:
        QatkitError: there is no batch, the file type is unknown, or the runtime is not installed.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.onnx import export_onnx
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     verify(model, Path(folder) / "model.onnx", [(x, torch.zeros(16))]).passed
        True
    """
    trained = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    plain = copy.deepcopy(trained)
    strip_qat(plain)
    rounds_inputs = any(layer.input_fake_quant is not None for _, layer in qat_layers(trained))
    failures: list[str]
    if path.suffix == ".onnx":
        weights, failures = check_onnx_weights(trained, path)
        try:
            runtime = load_runtime(path, threads)
        except QatkitError as error:
            if not path.exists() or error.__cause__ is None or isinstance(error.__cause__, ImportError):
                raise
            runtime = None
            failures.append(str(error))
    elif path.suffix == ".safetensors":
        weights, failures = _check_dense_weights(trained, path)
