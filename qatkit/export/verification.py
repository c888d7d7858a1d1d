"""Verify an exported file: read it back from disk, run it in its runtime, and compare it to the trained model.

The verification shares no code with the exporter. The codes are read with the file format's own library, the weights
are decoded by the runtime's own operator, and the expected values come from the model through
`qatkit.quantization.arithmetic`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import format_of_path
from qatkit.export.interface import Bound, Measured, ReadBack
from qatkit.export.judges import Judge, MetricJudge, TaskJudge
from qatkit.export.outputs import Forward, Output, Outputs, compare_outputs
from qatkit.quantization.prepare import fake_quantizers, quantized_weights, strip_qat
from qatkit.tasks import TASKS, Task, call

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Verification:
    """The comparison of an exported file to the trained model. Differences are listed, not raised."""

    passed: bool
    failures: list[str]
    """Descriptions of all differences; empty if the file is equivalent to the trained model."""
    format: str
    """The export format's name."""
    layers: int
    """Number of quantized layers whose codes or weights were compared."""
    weights: int
    """Number of weights in these layers."""
    samples: int
    """Number of samples predicted by both models; for text, the number of predicted tokens."""
    bound: str
    """Description of the limit on `mean_error`."""
    allowed_error: float | None
    """The limit as a number; None if outputs are not bounded."""
    mean_error: float | None
    """Mean of ``|runtime - trained|`` over all outputs; None if the file did not run."""
    max_error: float | None
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|``."""
    agreement: float | None
    """Fraction of samples on which both models predict the same class or next token."""
    task: str
    """The name of a task in `qatkit.tasks.TASKS`; empty if a metric was passed."""
    metric: str
    """The name of the metric."""
    trained_metric: float
    """Metric of the trained model."""
    runtime_metric: float | None
    """Metric of the file in its runtime."""
    runtime: str
    """The program that ran the file, as the subject of a sentence."""
    not_run: str
    """The format's runtime if it did not run, because no environment with it was passed; then `runtime` computed the
    outputs in its place. Empty if it ran.
    """
    text: str
    """The result in one line of text."""

    def with_failures(self, failures: list[str]) -> Verification:
        """Return the same comparison with additional failures; it fails if there are any."""
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
    task: Task | str | None = None,
    forward: Forward | None = None,
    metric: Metric | None = None,
    class_dim: int | None = None,
    python: Path | None = None,
) -> Verification:
    """Compare an exported file to the model from which it was exported.

    Every integer code, scale, zero point and bias in the file, and the weights that the runtime decodes from them, must
    equal the model's (``==``). Each output must stay within the format's error bound. For dense, sparse and
    compressed-tensors files, it must be equal. For ONNX, see `qatkit.export.onnx.format.bound`. A dense file does not
    quantize activations, so its outputs are not bounded if the model does.

    Args:
        model: The exported model, either plain or prepared and calibrated. It is not changed.
        path: The exported file or folder.
        batches: Pairs of inputs and labels, or mappings with the inputs of a transformers model and ``labels``; see
            `qatkit.tasks`. With `forward`, any type that it accepts.
        format: The export format's name. By default, it is inferred from the file name and content.
        threads: Number of threads of the runtime; None uses the runtime's default.
        task: A task of `qatkit.tasks.TASKS` or its name, such as "segmentation". By default, it is inferred from the
            batches; see `qatkit.tasks.task_of`.
        forward: ``(model, batch) -> outputs``, for models that qatkit cannot call directly. It is called with the
            trained model and with the loaded file. The outputs are a tensor, or tensors in dicts, lists, tuples and
            dataclasses. With a task, they are logits, or the outputs of a transformers model for that task.
        metric: A torchmetrics metric to use instead of the task's metric. It is updated with the outputs and the labels
            (the batch's ``labels`` or its second element), and must compute one number.
        class_dim: The class dimension of the outputs, used with `metric`. If None, output values are compared instead
            of classes.
        python: The interpreter of an environment with the runtime, for formats whose runtime is not in qatkit's own,
            such as MLX. If None, their files are decoded by formula, and their outputs computed by PyTorch.

    Returns:
        The comparison; differences are listed in `failures`, not raised.

    Raises:
        QatkitError: there are no batches, or they contain no predictions; the task does not support the labels, or the
            metric does not accept the outputs; the format is unknown or ambiguous; or the runtime is not installed.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.onnx.format import export_onnx
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, x, Path(folder) / "model.onnx")
        ...     verify(model, Path(folder) / "model.onnx", [(x, torch.zeros(16).long())]).passed
        True
    """
    path = Path(path)
    row = format_of_path(path, format)
    row.check_packages()
    check_python([row], python)
    judge = judge_of(task, metric, class_dim)
    trained = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    floating = copy.deepcopy(trained)
    strip_qat(floating)
    quantizers = [fake_quant for _, fake_quant in fake_quantizers(trained)]
    quantizes_inputs = any(fake_quant.role == "activation" for fake_quant in quantizers)
    precise = row.call("rounding", trained) if row.rounding and quantizes_inputs else None
    file: ReadBack = row.call("read_back", trained, path, threads, *([python] if row.environment else []))
    failures = list(file.failures)
    judges = judge, copy.deepcopy(judge)
    try:
        outputs = compare_outputs(
            trained,
            floating if quantizers else None,
            file.runtime,
            batches,
            failures,
            judges,
            forward or call,
            precise,
        )
        if file.after is not None:
            failures += file.after()
    finally:
        if file.close is not None:
            file.close()
    bounds = {
        name: row.call("bound", _measured(output, quantizes_inputs, trained)) for name, output in outputs.each.items()
    }
    failures += _beyond(bounds, outputs)
    bound = _mean_bound(bounds, outputs)
    layers = len(quantized_weights(trained))
    return Verification(
        passed=not failures,
        failures=failures,
        format=row.name,
        layers=layers,
        weights=file.weights,
        samples=outputs.samples,
        bound=bound.text if bound.limit is None else f"{bound.text}: {bound.limit:.2g}",
        allowed_error=bound.limit,
        mean_error=outputs.mean_error,
        max_error=outputs.max_error,
        quantization_error=outputs.quantization_error,
        agreement=outputs.agreement,
        task=outputs.task,
        metric=outputs.metric,
        trained_metric=outputs.trained_metric,
        runtime_metric=outputs.runtime_metric,
        runtime=file.name or row.runtime,
        not_run=file.not_run,
        text=_summary(failures, file, row, layers, bound, outputs),
    )


def _measured(output: Output, quantizes_inputs: bool, trained: nn.Module) -> Measured:
    count = max(output.values, 1)
    return Measured(
        quantizes_inputs=quantizes_inputs,
        half_precision=any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters()),
        quantization_error=output.quantization / max(output.measured, 1),
        mean_output=output.magnitude / count,
        whole=output.whole,
        rounding_error=output.rounding / count,
    )


def _beyond(bounds: Mapping[str, Bound], outputs: Outputs) -> list[str]:
    """Every output on its own: beside large values, even a wrong small one changes the mean of all by little."""
    failures = []
    for name, output in outputs.each.items() if outputs.ran else ():
        error, bound = output.error / max(output.values, 1), bounds[name]
        if bound.limit is not None and not error <= bound.limit:  # NaN fails too
            of = f" of '{name}'" if len(outputs.each) > 1 else ""
            unknown = (
                f"; the effect of rounding is unknown, because the model fails in float64: {outputs.not_in_float64}"
            )
            failures.append(
                f"outputs: the mean difference{of} from the trained model is {error:.3g}, but the bound ({bound.text}) "
                f"is {bound.limit:.3g} (largest difference {output.largest:.3g}, over {outputs.samples} samples"
                f"{unknown if outputs.not_in_float64 else ''})"
            )
    return failures


def _mean_bound(bounds: Mapping[str, Bound], outputs: Outputs) -> Bound:
    """The mean error that the bounds allow over all outputs."""
    texts = {bound.text for bound in bounds.values()}
    text = texts.pop() if len(texts) == 1 else "a limit for each output"
    limits = [(bound.limit, outputs.each[name].values) for name, bound in bounds.items()]
    total = sum(limit * values for limit, values in limits if limit is not None)
    unbounded = any(limit is None for limit, _ in limits)
    return Bound(text, None if unbounded else total / max(sum(values for _, values in limits), 1))


def check_python(rows: Sequence[ExportFormat], python: Path | None, key: str = "python") -> None:
    """Raise an error for an interpreter that no format uses, or that does not exist.

    Args:
        rows: The formats of the files to verify.
        python: The interpreter that was passed, or None.
        key: The argument or option, for errors.

    Raises:
        QatkitError: as above.
    """
    if python is None:
        return
    separate = next((row.name for row in rows if row.environment), None)
    if separate is None:
        names = " and ".join(dict.fromkeys(f"'{row.name}'" for row in rows))
        raise QatkitError(
            f"{names} files run in the environment of qatkit, so an interpreter has no effect",
            key=key,
            advice="remove it",
        )
    if not python.is_file():
        raise QatkitError(
            f"'{python}' is not a file",
            key=key,
            advice=f"pass the interpreter of an environment made by `qatkit environment {separate}`",
        )


def judge_of(task: Task | str | None, metric: Metric | None, class_dim: int | None) -> Judge:
    """Return what scores predictions: the metric if one is passed, otherwise the task.

    Args:
        task: As in `verify`.
        metric: As in `verify`.
        class_dim: As in `verify`.

    Raises:
        QatkitError: the task is unknown, or `class_dim` is passed without a metric.
    """
    if metric is not None:
        return MetricJudge(metric, class_dim)
    if class_dim is not None:
        raise QatkitError(
            f"{class_dim} has no effect without a metric, because tasks define their class dimension",
            key="class_dim",
            advice="also pass metric, or remove class_dim",
        )
    return TaskJudge(TASKS.row(task, "task") if isinstance(task, str) else task)


def _summary(
    failures: list[str], file: ReadBack, row: ExportFormat, layers: int, bound: Bound, outputs: Outputs
) -> str:
    if failures:
        return _failed(failures)
    codes = f"all {file.weights} weights of {layers} quantized layers match the trained ones; " if layers else ""
    limit = bound.text if bound.limit is None else f"{bound.text}, {bound.limit:.2g}"
    over = f"{outputs.samples} {outputs.counted}"
    by = f"; computed by {file.name.rstrip(',')}" if file.name else ""
    by += f"; to run {file.not_run}, pass --python" if file.not_run and row.environment else ""
    passed = f"passed, but {file.not_run} did not run" if file.not_run else "passed"
    return (
        f"{passed}: {codes}over {over}, outputs differ by {outputs.mean_error:.2g} on average (bound: "
        f"{limit}); the {outputs.metric} is {outputs.runtime_metric:.4f} (trained: {outputs.trained_metric:.4f}){by}"
    )


def _failed(failures: list[str]) -> str:
    return f"FAILED: {failures[0]}" + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")
