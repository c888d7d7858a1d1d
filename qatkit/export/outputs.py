"""Compare the outputs of an exported file in its runtime to the trained model's outputs, for any task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.interface import InputError
from qatkit.export.judges import Judge
from qatkit.export.output_tensors import difference, distances, finite, is_number, kinds, tensors
from qatkit.tasks import call

Forward = Callable[[Callable[..., Any], Any], Any]
"""``(model, batch) -> outputs``: a tensor, or tensors in dicts, lists, tuples and dataclasses."""


@dataclass
class Output:
    """Sums over the values of one output in all batches."""

    values: int = 0
    whole: bool = False
    """Whether the values are integers or booleans; each differs by 1 or not at all."""
    magnitude: float = 0.0
    """Of the finite values; 1 for each integer."""
    measured: int = 0
    """Number of values that the model without fake quantization returns in the same shape; the number of boxes may
    differ.
    """
    quantization: float = 0.0
    rounding: float = 0.0
    error: float = 0.0
    largest: float = 0.0

    def add(self, expected: Tensor, plain: Tensor | None) -> None:
        """Count the values of the trained model, and their difference from the model without fake quantization."""
        self.values += expected.numel()
        self.whole = not is_number(expected)
        sizes = expected.abs()[expected.isfinite()].sum(dtype=torch.float64) if not self.whole else expected.numel()
        self.magnitude += float(sizes)
        if plain is not None and plain.shape == expected.shape:
            self.quantization += difference(*finite(expected, plain))[0]
            self.measured += expected.numel()


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
    each: Mapping[str, Output]
    """The comparison of each output tensor, by its path in the outputs; "" if it is the only one."""
    not_in_float64: str = ""
    """The reason why the effect of rounding is unknown; empty if it was measured or not requested."""
    ran: bool = False
    """Whether the file computed all batches."""
    agreement: float | None = None
    runtime_metric: float | None = None

    @property
    def quantization_error(self) -> float:
        """Mean of ``|trained - the same weights without fake quantization|`` over all outputs."""
        return self._mean("quantization", "measured")

    @property
    def mean_error(self) -> float | None:
        """Mean of ``|runtime - trained|`` over all outputs; None if the file did not run."""
        return self._mean("error", "values") if self.ran else None

    @property
    def max_error(self) -> float | None:
        """Maximum of ``|runtime - trained|`` over all outputs; None if the file did not run."""
        return max(output.largest for output in self.each.values()) if self.ran else None

    def _mean(self, total: str, count: str) -> float:
        sums = [sum(float(getattr(output, name)) for output in self.each.values()) for name in (total, count)]
        return sums[0] / max(sums[1], 1.0)


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
        precise: The trained model in float64, with the runtime's rounding; None if its effect is not measured.

    Raises:
        QatkitError: there are no batches, or the runtime does not accept one.
    """
    judge, runtime_judge = judges
    number, same, not_in_float64 = 0, 0, ""
    each: defaultdict[str, Output] = defaultdict(Output)
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
        plain = tensors(forward(floating, batch)) if floating is not None else {}
        for name, output in found.items():
            each[name].add(output, plain.get(name))
        if precise is not None:
            try:
                exact = distances(tensors(forward(precise, _in_float64(batch))), found)
            except Exception as reason:  # a forward that asserts float32 or makes float32 tensors may raise anything
                precise, not_in_float64 = None, f"{type(reason).__name__}: {reason}"
            else:
                for name, (total, _) in exact.items():
                    each[name].rounding += total
        if runtime is None:
            continue
        try:
            computed = forward(runtime, batch)
            apart = distances(expected, computed)
        except InputError:
            raise
        except Exception as reason:  # the runtime's exceptions share no base class
            failures.append(f"outputs: the runtime fails on batch {number} (expected: {kinds(expected)}): {reason}")
            runtime = None
            continue
        for name, (total, largest) in apart.items():
            each[name].error += total
            each[name].largest = max(each[name].largest, largest)
        runtime_judge.add(computed, batch)
        same += judge.agreements(expected, computed, batch)
    if number == 0:
        raise QatkitError(
            "there are no batches to compare outputs for", key="batches", advice="pass at least one batch"
        )
    if judge.count == 0:
        raise QatkitError(
            "no prediction can be scored: the model returns none, or every label is ignored",
            key="batches",
            advice="pass batches with predictions and labels",
        )
    task, metric, counted = judge.words
    if not_in_float64:
        for sums in each.values():
            sums.rounding = 0.0  # of some batches only
    measured = Outputs(
        samples=judge.count,
        counted=counted,
        task=task,
        metric=metric,
        trained_metric=judge.value(),
        each=each,
        not_in_float64=not_in_float64,
    )
    if runtime is None:
        return measured
    return replace(measured, ran=True, agreement=same / judge.count, runtime_metric=runtime_judge.value())


def _in_float64(batch: Any) -> Any:
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(batch, Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _on_cpu(batch: Any) -> Any:
    from lightning.fabric.utilities.apply_func import move_data_to_device

    return move_data_to_device(batch, torch.device("cpu"))  # named tuples and dataclasses too
