"""Compare the outputs of an exported file in its runtime to the trained model's outputs, for any task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.judges import Judge
from qatkit.export.output_tensors import difference, distance, kinds, tensors
from qatkit.tasks import call

Forward = Callable[[Callable[..., Any], Any], Any]
"""``(model, batch) -> outputs``: a tensor, or tensors in dicts, lists, tuples and dataclasses."""


@dataclass(frozen=True)
class Outputs:
    """The comparison of a file's outputs to the trained model's outputs over all batches."""

    samples: int
    """Number of scored predictions."""
    counted: str
    """The plural noun for the scored predictions."""
    task: str
    metric: str
    trained_metric: float
    mean_output: float
    quantization_error: float
    """Mean of ``|trained - the same weights without fake quantization|`` over outputs with equal shapes; shapes may
    differ, for example with the number of detected boxes.
    """
    rounding_error: float = 0.0
    """Mean of ``|trained - the same in float64|``."""
    mean_error: float | None = None
    max_error: float | None = None
    agreement: float | None = None
    runtime_metric: float | None = None


@torch.no_grad()
def compare_outputs(
    trained: nn.Module,
    floating: nn.Module | None,
    runtime: Callable[..., Any] | None,
    batches: Iterable[Any],
    failures: list[str],
    judges: tuple[Judge, Judge],
    forward: Forward = call,
    precise: nn.Module | None = None,
) -> Outputs:
    """Run the three models on all batches; an exception in the runtime is recorded as a failure.

    Args:
        trained: The model.
        floating: The same weights without fake quantization; None if nothing is quantized.
        runtime: The file loaded in its runtime, with the model's call signature; None if it cannot be loaded.
        batches: The batches of `verify`.
        failures: The list to which differences are added.
        judges: Two judges: one for the trained model, and one for the runtime.
        forward: Calls a model on a batch.
        precise: The trained model in float64; None if the effect of rounding is not measured.

    Raises:
        QatkitError: there are no batches.
    """
    judge, runtime_judge = judges
    number, elements, measured_elements, same = 0, 0, 0, 0
    outputs, quantization, rounding, error, largest = 0.0, 0.0, 0.0, 0.0, 0.0
    for number, batch in enumerate(map(_on_cpu, batches), 1):
        expected = forward(trained, batch)
        found = tensors(expected)
        if not found:
            raise QatkitError(
                f"the model returned {kinds(expected)}, which contains no tensor",
                key="forward",
                advice="return a tensor, or tensors in dicts, lists, tuples or dataclasses",
            )
        judge.add(expected, batch)
        elements += sum(output.numel() for output in found.values())
        outputs += sum(float(output.abs().sum(dtype=torch.float64)) for output in found.values())
        if floating is not None:
            plain = tensors(forward(floating, batch))
            alike = {name for name in found.keys() & plain.keys() if found[name].shape == plain[name].shape}
            quantization += sum(difference(found[name], plain[name])[0] for name in alike)
            measured_elements += sum(found[name].numel() for name in alike)
        if precise is not None:
            try:
                rounding += distance(tensors(forward(precise, _in_float64(batch))), found)[0]
            except (RuntimeError, ValueError):  # it makes float32 tensors of its own: no effect of rounding is allowed
                precise, rounding = None, 0.0
        if runtime is None:
            continue
        try:
            computed = forward(runtime, batch)
            total, most = distance(expected, computed)
        except Exception as reason:  # the runtime's exceptions share no base class
            failures.append(f"outputs: the runtime fails on batch {number} (expected: {kinds(expected)}): {reason}")
            runtime = None
            continue
        error += total
        largest = max(largest, most)
        runtime_judge.add(computed, batch)
        same += judge.agreements(expected, computed, batch)
    if number == 0:
        raise QatkitError("there are no batches to compare outputs on", key="batches", advice="pass at least one batch")
    if judge.count == 0:
        raise QatkitError(
            "no prediction can be scored: the model returns none, or every label is ignored",
            key="batches",
            advice="pass batches with predictions and labels",
        )
    task, metric, counted = judge.words
    measured = Outputs(
        samples=judge.count,
        counted=counted,
        task=task,
        metric=metric,
        trained_metric=judge.value(),
        mean_output=outputs / elements,
        quantization_error=quantization / max(measured_elements, 1),
        rounding_error=rounding / elements,
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


def _in_float64(batch: Any) -> Any:
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(batch, Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _on_cpu(batch: Any) -> Any:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    return move_data_to_device(batch, torch.device("cpu"))  # named tuples and dataclasses too
