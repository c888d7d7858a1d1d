"""Compare the outputs of an exported file in its runtime with those of the trained model, over batches of any task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.tasks import Scores, Task, agree, answers, call, task_of

if TYPE_CHECKING:
    from torchmetrics import Metric

Forward = Callable[[Callable[..., Any], Any], Any]
"""``(model, batch) -> outputs``: a tensor, or tensors in dicts, lists and tuples."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of a file and of the trained model, compared over all batches."""

    samples: int
    """Predictions that were scored."""
    counted: str
    """What was scored, in the plural."""
    task: str
    metric: str
    trained_metric: float
    mean_output: float
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|``."""
    mean_error: float | None = None
    max_error: float | None = None
    agreement: float | None = None
    runtime_metric: float | None = None


class Judge(Protocol):
    """Scores the outputs of one model, and counts where two models agree."""

    def add(self, outputs: Any, batch: Any) -> None:
        """Score the outputs for one batch."""

    def agreements(self, ours: Any, theirs: Any, batch: Any) -> int:
        """The number of predictions for which both outputs give the same answer."""

    def value(self) -> float:
        """The metric over all batches."""

    @property
    def count(self) -> int:
        """Predictions that were scored."""

    @property
    def words(self) -> tuple[str, str, str]:
        """The names of the task and of its metric, and what was scored."""


class TaskJudge:
    """Scores outputs by a task of the table.

    Args:
        task: The task that the data declares; None infers it from the batches.
    """

    def __init__(self, task: Task | None) -> None:
        self.scores = Scores(task)
        self.declared = task

    def add(self, outputs: Tensor, batch: Any) -> None:
        """Score one batch."""
        self.scores.add(outputs, batch)

    def agreements(self, ours: Tensor, theirs: Tensor, batch: Any) -> int:
        """See `qatkit.tasks.agree`."""
        rows, labels = answers(ours, batch, self.declared)
        return int(agree(rows, answers(theirs, batch, self.declared)[0], labels, task_of(batch, self.declared)))

    def value(self) -> float:
        """The metric that the task is judged by."""
        return self.scores.metrics()[self._task.metric]

    @property
    def count(self) -> int:
        """Labels that were counted."""
        return self.scores.count

    @property
    def words(self) -> tuple[str, str, str]:
        """The words of the task's row."""
        return self._task.name, self._task.metric, self._task.counted

    @property
    def _task(self) -> Task:
        assert self.scores.task is not None
        return self.scores.task


class MetricJudge:
    """Scores outputs by a metric of the user's.

    Args:
        metric: Updated with the outputs, and with the labels of the batch.
        class_dim: The dimension of the outputs whose largest value is the answer; None compares all values to 1%.
    """

    def __init__(self, metric: Metric, class_dim: int | None) -> None:
        self.metric = metric.clone()
        self.metric.reset()
        self.class_dim = class_dim
        self.count = 0

    def add(self, outputs: Any, batch: Any) -> None:
        """Update the metric, and count the predictions."""
        self.metric.update(outputs, batch["labels"] if isinstance(batch, Mapping) else batch[1])
        self.count += sum(self._answers(output).numel() for output in tensors(outputs).values())

    def agreements(self, ours: Any, theirs: Any, batch: Any) -> int:
        """Compare the answers of all outputs."""
        count = 0
        for name, output in tensors(ours).items():
            first, second = self._answers(output), self._answers(tensors(theirs)[name])
            same = first == second if self.class_dim is not None else torch.isclose(second, first, rtol=1e-2, atol=1e-6)
            count += int(same.sum())
        return count

    def value(self) -> float:
        """The metric over all batches."""
        return float(self.metric.compute())

    @property
    def words(self) -> tuple[str, str, str]:
        """The metric's class name stands for the task."""
        return "", type(self.metric).__name__, "predictions"

    def _answers(self, output: Tensor) -> Tensor:
        return output if self.class_dim is None else output.argmax(self.class_dim)


def tensors(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors in a model's outputs by their place in nested dicts, lists and tuples.

    Example:
        >>> list(tensors([{"boxes": torch.zeros(1)}, torch.ones(2)]))
        ['0.boxes', '1']
    """
    if isinstance(outputs, Tensor):
        return {"": outputs}
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(outputs, Mapping):
        entries = outputs.items()
    elif isinstance(outputs, list | tuple):
        entries = enumerate(outputs)
    return {f"{key}.{name}".rstrip("."): tensor for key, part in entries for name, tensor in tensors(part).items()}


@torch.no_grad()
def compare_outputs(
    trained: nn.Module,
    floating: nn.Module | None,
    runtime: Callable[..., Any] | None,
    batches: Iterable[Any],
    failures: list[str],
    judges: tuple[Judge, Judge],
    forward: Forward = call,
) -> Outputs:
    """Run the three models on all batches; an exception in the runtime counts as a failure.

    Args:
        trained: The model.
        floating: The same weights without fake quantization; None if nothing is quantized.
        runtime: The file in its runtime, called as the model is; None if it cannot be loaded.
        batches: The batches of `verify`.
        failures: Appended to.
        judges: They score the trained model and the runtime.
        forward: How a model is called with a batch.

    Raises:
        QatkitError: there is no batch.
    """
    judge, runtime_judge = judges
    elements, same, outputs, quantization, error, largest = 0, 0, 0.0, 0.0, 0.0, 0.0
    for batch in map(_on_cpu, batches):
        expected = forward(trained, batch)
        judge.add(expected, batch)
        elements += sum(output.numel() for output in tensors(expected).values())
        outputs += sum(float(output.abs().sum(dtype=torch.float64)) for output in tensors(expected).values())
        if floating is not None:
            quantization += _distance(expected, forward(floating, batch))[0]
        if runtime is None:
            continue
        try:
            computed = forward(runtime, batch)
            total, most = _distance(expected, computed)
        except Exception as reason:  # the runtime's exceptions share no base class
            first = next(iter(tensors(expected).values()))
            failures.append(f"outputs: the runtime fails on a batch of {len(first)}: {reason}")
            runtime = None
            continue
        error += total
        largest = max(largest, most)
        runtime_judge.add(computed, batch)
        same += judge.agreements(expected, computed, batch)
    if judge.count == 0:
        raise QatkitError("there are no batches to compare outputs on", key="batches", advice="pass at least one")
    task, metric, counted = judge.words
    measured = Outputs(
        samples=judge.count,
        counted=counted,
        task=task,
        metric=metric,
        trained_metric=judge.value(),
        mean_output=outputs / elements,
        quantization_error=quantization / elements,
    )
    if runtime is None:
        return measured
    return replace(
        measured,
        mean_error=error / elements,
        max_error=largest,
        agreement=same / judge.count,
        runtime_metric=runtime_judge.value(),
    )


def _distance(expected: Any, computed: Any) -> tuple[float, float]:
    """Sum and maximum of the absolute differences of all outputs.

    Raises:
        ValueError: an output is missing or has a different shape.
    """
    ours, theirs = tensors(expected), tensors(computed)
    if ours.keys() != theirs.keys():
        raise ValueError(f"outputs {sorted(theirs)} instead of {sorted(ours)}")
    total, largest = 0.0, 0.0
    for name, output in ours.items():
        if theirs[name].shape != output.shape:
            place = f"output '{name}' has " if name else ""
            raise ValueError(f"{place}shape {list(theirs[name].shape)} instead of {list(output.shape)}")
        difference = (theirs[name] - output).abs() if output.is_floating_point() else (theirs[name] != output).float()
        total += float(difference.sum(dtype=torch.float64))
        largest = max(largest, float(difference.max())) if difference.numel() else largest
    return total, largest


def _on_cpu(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.cpu()
    if isinstance(batch, Mapping):
        return {key: _on_cpu(value) for key, value in batch.items()}
    return [_on_cpu(part) for part in batch] if isinstance(batch, list | tuple) else batch
