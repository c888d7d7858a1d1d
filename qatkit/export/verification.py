"""Verify an exported file: read it back from disk, run it in its runtime, and compare it with the trained model.

No code of the exporter is used here. The codes are read with the file format's own library, the weights are decoded by
the runtime's own operator, and the expected values come from the model through `qatkit.quantization.arithmetic`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.export.formats import format_of_path
from qatkit.export.interface import Bound, Measured, ReadBack
from qatkit.quantization.prepare import fake_quantizers, quantized_weights, strip_qat
from qatkit.tasks import Scores, Task, answers, call


@dataclass(frozen=True)
class Verification:
    """The comparison of an exported file with the trained model. Differences are listed, not raised."""

    passed: bool
    failures: list[str]
    """Every difference, as text; empty if the file computes what was trained."""
    format: str
    """The export format's name."""
    layers: int
    """Quantized layers whose codes or weights were compared."""
    weights: int
    """Weights in these layers."""
    samples: int
    """Number of samples that both models predicted; for text, number of predicted tokens."""
    bound: str
    """The limit of `mean_error`, as text."""
    allowed_error: float | None
    """The limit as a number; None if outputs are not bounded."""
    mean_error: float | None
    """Mean of ``|runtime - trained|`` over all outputs; None if the file did not run."""
    max_error: float | None
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|``."""
    agreement: float | None
    """Fraction of samples on which both agree: the same class, or the same next token."""
    task: str
    """The name of a row of `qatkit.tasks.TASKS`."""
    metric: str
    """The metric that the task is judged by."""
    trained_metric: float
    """Metric of the trained model."""
    runtime_metric: float | None
    """Metric of the file in its runtime."""
    text: str
    """The result in one line of text."""

    def with_failures(self, failures: list[str]) -> Verification:
        """The same comparison with additional failures; it fails if there are any."""
        if not failures:
            return self
        listed = [*self.failures, *failures]
        return replace(self, passed=False, failures=listed, text=_failed(listed))

    def summary(self) -> str:
        """The result in one line of text."""
        return self.text


def verify(
    model: nn.Module,
    path: Path | str,
    batches: Iterable[Any],
    format: str | None = None,
    threads: int | None = None,
    task: Task | None = None,
) -> Verification:
    """Compare an exported file with the model it was exported from.

    Every integer code, scale, zero point and bias in the file, and the weights that the runtime decodes from them, must
    equal the model's (``==``). Outputs must stay within the format's error bound: equal for dense, sparse and
    compressed-tensors files; for ONNX within 1 % of the quantization error if inputs are quantized (a different
    summation order may move a value across a rounding border), otherwise within 1e-4 of the mean output. A dense file
    does not quantize activations, so its outputs are not bounded if the model does.

    Args:
        model: The exported model: plain, or prepared and calibrated. Left unchanged.
        path: The exported file or folder.
        batches: Pairs of inputs and class labels, ``[batch, ...]`` and ``[batch]``, or mappings as transformers models
            take them, with ``labels``; see `qatkit.tasks`.
        format: The export format's name; by default it is inferred from the file name and content.
        threads: Threads of the runtime; None leaves the choice to it.
        task: The task declared by the data; by default it is inferred from the batches, see `qatkit.tasks.task_of`.

    Returns:
        The comparison; differences are listed in `failures`, not raised.

    Raises:
        QatkitError: there is no batch, the format is unknown or ambiguous, or the runtime is not installed.

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
    row = format_of_path(path, format)
    row.check_packages()
    trained = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    floating = copy.deepcopy(trained)
    strip_qat(floating)
    quantizers = [fake_quant for _, fake_quant in fake_quantizers(trained)]
    file: ReadBack = row.call("read_back", trained, path, threads)
    failures = list(file.failures)
    outputs = _compare_outputs(trained, floating if quantizers else None, file.runtime, batches, failures, task)
    bound: Bound = row.call(
        "bound",
        Measured(
            quantizes_inputs=any(fake_quant.role == "activation" for fake_quant in quantizers),
            half_precision=any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters()),
            quantization_error=outputs.quantization_error,
            mean_output=outputs.mean_output,
        ),
    )
    error, limit = outputs.mean_error, bound.limit
    if error is not None and limit is not None and not error <= limit:  # NaN fails too
        failures.append(
            f"outputs: the mean difference from the trained model is {error:.3g}, and {bound.text} is {limit:.3g} "
            f"(largest difference {outputs.max_error:.3g}, over {outputs.samples} samples)"
        )
    layers = len(quantized_weights(trained))
    return Verification(
        passed=not failures,
        failures=failures,
        format=row.name,
        layers=layers,
        weights=file.weights,
        samples=outputs.samples,
        bound=bound.text if limit is None else f"{bound.text}: {limit:.2g}",
        allowed_error=limit,
        mean_error=error,
        max_error=outputs.max_error,
        quantization_error=outputs.quantization_error,
        agreement=outputs.agreement,
        task=outputs.task.name,
        metric=outputs.task.metric,
        trained_metric=outputs.trained_metric,
        runtime_metric=outputs.runtime_metric,
        text=_summary(failures, file.weights, layers, bound, outputs),
    )


def _summary(failures: list[str], weights: int, layers: int, bound: Bound, outputs: _Outputs) -> str:
    if failures:
        return _failed(failures)
    codes = f"all {weights} weights of {layers} quantized layers match the trained ones; " if layers else ""
    limit = bound.text if bound.limit is None else f"{bound.text}, {bound.limit:.2g}"
    over = f"{outputs.samples} {outputs.task.counted}"
    return (
        f"passed: {codes}over {over}, outputs differ by {outputs.mean_error:.2g} on average (bound: "
        f"{limit}); the {outputs.task.metric} is {outputs.runtime_metric:.4f} (trained: {outputs.trained_metric:.4f})"
    )


def _failed(failures: list[str]) -> str:
    return f"FAILED: {failures[0]}" + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")


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


@torch.no_grad()
def _compare_outputs(
    trained: nn.Module,
    floating: nn.Module | None,
    runtime: Callable[..., Any] | None,
    batches: Iterable[Any],
    failures: list[str],
    declared: Task | None,
) -> _Outputs:
    """Run the three models on all batches; an exception in the runtime counts as a failure.

    Args:
        trained: The model.
        floating: The same weights without fake quantization; None if nothing is quantized.
        runtime: The file in its runtime, called as the model is; None if it cannot be loaded.
        batches: The batches of `verify`.
        failures: Appended to.
        declared: The task that the data declares.
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
            computed = call(runtime, batch)
            if computed.shape != expected.shape:
                raise ValueError(f"shape {list(computed.shape)} instead of {list(expected.shape)}")
        except Exception as reason:  # the runtime's exceptions share no base class
            failures.append(f"outputs: the runtime fails on a batch of {len(expected)}: {reason}")
            runtime = None
            continue
        difference = (computed - expected).abs()
        error += float(difference.sum(dtype=torch.float64))
        largest = max(largest, float(difference.max()))
        runtime_scores.add(computed, batch)
        ours, labels = answers(expected, batch, declared)
        agree = answers(computed, batch, declared)[0].argmax(-1) == ours.argmax(-1)
        same += int((agree & (labels != IGNORED)).sum())
    task = scores.task
    if scores.count == 0 or task is None:
        raise QatkitError("there are no batches to compare outputs on", key="batches", advice="pass at least one")
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
