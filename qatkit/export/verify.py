"""Whether a file computes what training computed: read back from disk and run in the runtime it was written for.

Nothing of the exporter is used here. The codes are read by the file format's own library, the weights are decoded by
the runtime's own operator, and the expected values come from the model through `qatkit.quantization.arithmetic`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.export.compressed_check import open_compressed
from qatkit.export.onnx_weights import check_onnx_weights
from qatkit.export.runtime import load_runtime
from qatkit.export.sparse import is_sparse, read_weights
from qatkit.quantization.experts import QATExperts
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import fake_quantizers, quantized_weights, strip_qat
from qatkit.tasks import Scores, Task, answers, call


@dataclass(frozen=True)
class Verification:
    """What was compared, and what differed. A failed check raises nothing; `passed` says it."""

    passed: bool
    failures: list[str]
    """What differs, in words; empty where the file computes what was trained."""
    format: str
    """"onnx", "dense", "sparse" or "compressed_tensors"."""
    layers: int
    """Quantized layers whose codes (onnx, compressed_tensors) or weights (dense, sparse) were compared."""
    weights: int
    """Numbers in them."""
    samples: int
    """Samples that both models answered; of texts the tokens that are predicted."""
    bound: str
    """What `mean_error` may be, in words."""
    allowed_error: float | None
    """The bound as a number; None where outputs are not bounded."""
    mean_error: float | None
    """Mean of ``|runtime - trained|`` over all outputs; None where the file did not run."""
    max_error: float | None
    quantization_error: float
    """Mean of ``|trained - the same weights without rounding|``."""
    agreement: float | None
    """Fraction of samples on whose class, or next token, both agree."""
    task: str
    """Name of the row of `qatkit.tasks.TASKS`."""
    metric: str
    """The metric that the task is judged by."""
    trained_metric: float
    """Of the model."""
    runtime_metric: float | None
    """Of the file in its runtime."""
    text: str
    """The result in one line, in words."""

    def summary(self) -> str:
        """The result in one line, in words."""
        return self.text


def verify(
    model: nn.Module,
    path: Path | str,
    batches: Iterable[Any],
    threads: int | None = None,
    task: Task | None = None,
) -> Verification:
    """Compare an exported file with the model it was made from.

    Weights: every integer code, scale and zero point in the file, and the weights the runtime decodes from them, must
    equal the model's (``==``); and so must biases. Outputs: where inputs
    of layers are quantized, the mean difference must stay within 1 % of the quantization error (another order of
    summation may move a value across a rounding border); elsewhere within 1e-4 of the mean output. A dense or sparse
    file must give equal weights and, where no inputs are quantized, equal outputs. A folder of compressed-tensors is
    loaded by transformers; in float32 its outputs must be equal.

    Args:
        model: What was exported: plain, or prepared and calibrated. Left as it is.
        path: A ``.onnx`` or ``.safetensors`` file, or the folder that `export_compressed` wrote.
        batches: Pairs of inputs and class labels, ``[batch, ...]`` and ``[batch]``, or mappings as models of
            transformers take them, with ``labels``; see `qatkit.tasks`.
        threads: Threads of the runtime; None leaves the choice to it.
        task: The task that the data declare; without one the batches decide, see `qatkit.tasks.task_of`.

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
    path = Path(path)
    form = "compressed_tensors" if path.is_dir() else _FORMATS.get(path.suffix)
    if form is None:
        raise QatkitError(f"{path}: '{path.suffix}' files cannot be verified; give one of {sorted(_FORMATS)}")
    if not path.exists():
        raise QatkitError(f"{path}: there is no such file; export the model first")
    trained = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    floating = copy.deepcopy(trained)
    strip_qat(floating)
    quantizers = [fake_quant for _, fake_quant in fake_quantizers(trained)]
    weights, failures, runtime = _open(form, trained, path, threads)
    outputs = _compare_outputs(trained, floating if quantizers else None, runtime, batches, failures, task)
    rounds_inputs = any(fake_quant.role == "activation" for fake_quant in quantizers)
    half = any(weight.dtype in (torch.float16, torch.bfloat16) for weight in trained.parameters())
    bound, allowed = _bound(form, rounds_inputs, half, outputs)
    if outputs.mean_error is not None and allowed is not None and not outputs.mean_error <= allowed:  # NaN fails too
        failures.append(
            f"outputs: the mean difference from the trained model is {outputs.mean_error:.3g}, and {bound} is "
            f"{allowed:.3g} (largest difference {outputs.max_error:.3g}, over {outputs.samples} samples)"
        )
    quantized = len(quantized_weights(trained))
    return Verification(
        passed=not failures,
        failures=failures,
        format="sparse" if form == "dense" and is_sparse(path) else form,
        layers=quantized,
        weights=weights,
        samples=outputs.samples,
        bound=f"{bound}: {allowed:.2g}" if allowed is not None else bound,
        allowed_error=allowed,
        mean_error=outputs.mean_error,
        max_error=outputs.max_error,
        quantization_error=outputs.quantization_error,
        agreement=outputs.agreement,
        task=outputs.task.name,
        metric=outputs.task.metric,
        trained_metric=outputs.trained_metric,
        runtime_metric=outputs.runtime_metric,
        text=_text(failures, weights, quantized, bound, allowed, outputs),
    )


def _text(failures: list[str], weights: int, layers: int, bound: str, allowed: float | None, outputs: _Outputs) -> str:
    if failures:
        return f"FAILED: {failures[0]}" + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")
    codes = f"all {weights} weights of {layers} quantized layers are the trained ones; " if layers else ""
    limit = f"{bound}, {allowed:.2g}" if allowed is not None else bound
    over = f"{outputs.samples} {outputs.task.counted}"
    return (
        f"passed: {codes}over {over} outputs differ by {outputs.mean_error:.2g} on average (bound: "
        f"{limit}), the {outputs.task.metric} is {outputs.runtime_metric:.4f} (trained {outputs.trained_metric:.4f})"
    )


_FORMATS = {".onnx": "onnx", ".safetensors": "dense"}


@dataclass(frozen=True)
class _Outputs:
    samples: int
    mean_output: float
    quantization_error: float
    task: Task
    trained_metric: float
    mean_error: float | None = None
    max_error: float | None = None
    agreement: float | None = None
    runtime_metric: float | None = None


def _bound(form: str, rounds_inputs: bool, half: bool, outputs: _Outputs) -> tuple[str, float | None]:
    if form == "dense" and rounds_inputs:
        return "none, since a dense file does not round activations", None
    # transformers rounds inputs as training does, but in their dtype: in half precision a scale has fewer digits
    if form == "dense" or (form == "compressed_tensors" and not (half and rounds_inputs)):
        return "exactly equal outputs", 0.0
    if rounds_inputs:  # float32 noise is allowed even where quantization happens to change nothing
        return "1 % of the quantization error", max(0.01 * outputs.quantization_error, 1e-6 * outputs.mean_output)
    return "1e-4 of the mean output", 1e-4 * outputs.mean_output


def _open(
    form: str, trained: nn.Module, path: Path, threads: int | None
) -> tuple[int, list[str], Callable[..., Any] | None]:
    if form == "compressed_tensors":
        return open_compressed(trained, path)
    return _open_dense(trained, path) if form == "dense" else _open_onnx(trained, path, threads)


def _open_onnx(
    trained: nn.Module, path: Path, threads: int | None
) -> tuple[int, list[str], Callable[[Tensor], Tensor] | None]:
    weights, failures = check_onnx_weights(trained, path)
    try:
        return weights, failures, load_runtime(path, threads)
    except QatkitError as error:
        return weights, [*failures, str(error)], None


@torch.no_grad()
def _open_dense(trained: nn.Module, path: Path) -> tuple[int, list[str], Callable[[Tensor], Tensor] | None]:
    loaded = copy.deepcopy(trained)
    strip_qat(loaded)
    expected = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    weights = sum(weight.numel() for _, weight, _ in quantized_weights(trained))
    for name, layer in trained.named_modules(remove_duplicate=False):  # a shared layer is there under each name
        if isinstance(layer, QATLayer | QATExperts):
            expected |= {f"{name}.{part}" if name else part: value for part, value in layer.shipped().items()}
    try:
        loaded.load_state_dict(read_weights(path), strict=True)
    except (RuntimeError, KeyError, SafetensorError) as error:
        return weights, [f"{path.name} does not load into the plain model: {error}"], None
    failures = []
    for key, tensor in loaded.state_dict().items():
        wrong = (tensor != expected[key]) & ~(tensor.isnan() & expected[key].isnan())
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            failures.append(f"'{key}': {int(wrong.sum())} of {wrong.numel()} values differ, the first at {first}")
    return weights, failures, loaded


@torch.no_grad()
def _compare_outputs(
    trained: nn.Module,
    floating: nn.Module | None,
    runtime: Callable[..., Any] | None,
    batches: Iterable[Any],
    failures: list[str],
    declared: Task | None,
) -> _Outputs:
    """Run the three models on all batches; a runtime that breaks is one more failure.

    Args:
        trained: The model.
        floating: The same without rounding; None where nothing is rounded.
        runtime: What the file computes, called as the model is; None where it cannot be loaded.
        batches: As `verify` takes them.
        failures: Appended to.
        declared: The task that the data declare.
    """
    scores, runtime_scores, same = Scores(declared), Scores(declared), 0
    elements, outputs, quantization, error, largest = 0, 0.0, 0.0, 0.0, 0.0
    for batch in map(_on_cpu, batches):
        expected = call(trained, batch)
        scores.add(expected, batch)
        elements += expected.numel()
        outputs += float(expected.abs().sum(dtype=torch.float64))
        if floating is not None:
            quantization += float((expected - call(floating, batch)).abs().sum(dtype=torch.float64))
        if runtime is None:
            continue
        try:
            found = call(runtime, batch)
            if found.shape != expected.shape:
                raise ValueError(f"shape {list(found.shape)} instead of {list(expected.shape)}")
        except Exception as reason:  # the runtime's exceptions share no base class
            failures.append(f"outputs: the runtime fails on a batch of {len(expected)}: {reason}")
            runtime = None
            continue
        difference = (found - expected).abs()
        error += float(difference.sum(dtype=torch.float64))
        largest = max(largest, float(difference.max()))
        runtime_scores.add(found, batch)
        ours, labels = answers(expected, batch, declared)
        agree = answers(found, batch, declared)[0].argmax(-1) == ours.argmax(-1)
        same += int((agree & (labels != IGNORED)).sum())
    task = scores.task
    if scores.count == 0 or task is None:
        raise QatkitError("verify: there is no batch to compare outputs on; give at least one")
    trained_metric = scores.metrics()[task.metric]
    measured = _Outputs(scores.count, outputs / elements, quantization / elements, task, trained_metric)
    if runtime is None:
        return measured
    return replace(
        measured,
        mean_error=error / elements,
        max_error=largest,
        agreement=same / scores.count,
        runtime_metric=runtime_scores.metrics()[task.metric],
    )


def _on_cpu(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
    return [part.cpu() for part in batch]
