"""Find the first layer whose output in an exported file differs from the trained model's.

The file and the model run on the same batches, and the outputs of every layer are compared in the order of the model.
The trained layer also runs on the input that the layer has in the file. So a difference that the layer makes itself is
told from one that it inherits, and from a rounding flip: a small difference of the input that changes a code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.interface import LayerCall, ReadBack, Walk
from qatkit.export.output_tensors import distances, is_number, tensors
from qatkit.export.outputs import Forward
from qatkit.export.walking import recorded
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.prepare import qat_weights
from qatkit.schemes import SCHEMES, Scheme
from qatkit.spec import QuantSpec
from qatkit.tasks import call

Kind = Literal["rounding", "flip", "inherited", "own"]

OUTPUTS = "the model's outputs"
"""Stands for a layer after the last one."""
ROUNDING = 1e-5
"""Largest difference between two float32 summation orders, relative to the largest value of an output."""
FLIPS = 0.01
"""Fraction of the inputs of an output whose codes rounding may change; at least one."""


@dataclass(frozen=True)
class LayerDifference:
    """The output of a layer that differs in the file."""

    layer: str
    scheme: str
    """The name of the layer's quantization scheme, or its description."""
    kind: Kind
    """"own": the layer itself computes another result. "flip": rounding changes single codes of its input. "rounding":
    within the differences of rounding. "inherited": operations between it and the layer before it differ.
    """
    mean_error: float
    """Mean of ``|file - trained|``."""
    max_error: float
    mean_output: float
    """Mean of ``|trained|``."""
    input_error: float
    """Maximum of ``|file - trained|`` over the layer's input."""

    @property
    def text(self) -> str:
        """The name, the size and the cause of the difference."""
        name = self.layer if self.layer == OUTPUTS else f"'{self.layer}' ({self.scheme})"
        return (
            f"{name}: {self.mean_error:.2g} on average and {self.max_error:.2g} at most, where outputs are "
            f"{self.mean_output:.2g} on average; {_REASONS[self.kind].format(input=f'{self.input_error:.2g}')}"
        )


_REASONS: dict[str, str] = {
    "own": "larger than rounding: the trained layer computes another output from the same input",
    "flip": "a rounding flip: its input differs by {input} at most, which changes single codes",
    "rounding": "of the size of rounding; its input differs by {input} at most",
    "inherited": "larger than rounding, but inherited: an operation between the layer before it and this place "
    "computes another result",
}


@dataclass(frozen=True)
class Explanation:
    """The result of walking through a file."""

    format: str
    layers: int
    """Number of compared layers; 0 if the file cannot be walked."""
    batches: int
    """Number of compared batches."""
    first: LayerDifference | None
    """The first layer whose output differs, beyond rounding if the runtime's summation order differs from PyTorch's."""
    larger: LayerDifference | None
    """The first layer after `first` that itself computes another result, if `first` does not."""
    skipped: dict[str, str]
    """Layers that could not be compared, with the reason."""
    text: str
    """The result in a few sentences."""


@torch.no_grad()
def explain(
    model: nn.Module,
    path: Path | str,
    batches: Iterable[Any],
    format: str | None = None,
    threads: int | None = None,
    forward: Forward | None = None,
) -> Explanation:
    """Walk through a model and its exported file layer by layer, and find the first output that differs.

    Batches are compared until one of them has a difference that is larger than rounding.

    Args:
        model: The exported model, as in `verify`. It is not changed.
        path: The exported file or folder.
        batches: The batches of `verify`.
        format: The export format's name. By default, it is inferred from the file.
        threads: Number of threads of the runtime; None uses the runtime's default.
        forward: ``(model, batch) -> outputs``, as in `verify`.

    Returns:
        The first difference, or the reason why the file cannot be walked.

    Raises:
        QatkitError: there are no batches, the format is unknown, or the runtime is not installed.

    Example:
        >>> import tempfile, torch
        >>> from qatkit.export.dense import export_dense
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.rand(16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_dense(model, Path(folder) / "model.safetensors")
        ...     explain(model, Path(folder) / "model.safetensors", [(x, torch.zeros(16).long())]).text
        'no layer differs: the outputs of 1 layers are equal over 1 batches'
    """
    path = Path(path)
    row = format_of_path(path, format)
    if not row.walk:
        names = ", ".join(name for name, each in FORMATS.items() if each.walk)
        return _not_walked(row, f"its runtime does not return the outputs of single layers (supported: {names})")
    row.check_packages()
    trained = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    file: ReadBack = row.call("read_back", trained, path, threads)
    try:
        if file.runtime is None:
            return _not_walked(row, file.failures[0])
        schemes = {
            weight.name.removesuffix(f".{weight.part}"): scheme_words(_scheme(weight))
            for weight in qat_weights(trained)
        }
        return _walked(row, row.call("walk", trained, path, file.runtime), schemes, batches, forward or call)
    finally:
        if file.close is not None:
            file.close()


def _not_walked(row: ExportFormat, reason: str) -> Explanation:
    return Explanation(row.name, 0, 0, None, None, {}, f"'{row.name}' cannot be walked layer by layer: {reason}")


def _walked(
    row: ExportFormat, walk: Walk, schemes: dict[str, str], batches: Iterable[Any], forward: Forward
) -> Explanation:
    skipped, compared = dict(walk.skipped), set[str]()
    first = larger = None
    number = 0
    for number, batch in enumerate(batches, 1):
        ours: list[LayerCall] = []
        with recorded(walk.model, walk.layers, ours):
            expected = forward(walk.model, batch)
        try:
            computed = forward(walk.runtime, batch)
        except Exception as reason:  # the runtime's exceptions share no base class
            return _not_walked(row, f"the runtime fails on batch {number}: {reason}")
        ours.append(LayerCall(OUTPUTS, (), {}, expected))
        theirs = [*walk.calls, LayerCall(OUTPUTS, (), {}, computed)]
        for one, other in _pairs(ours, theirs, skipped):
            compared.add(one.layer)
            found = _difference(walk.model, one, other, schemes.get(one.layer, "not quantized"))
            if found is None or (found.kind == "rounding" and row.rounding):
                continue
            if first is None:
                first = found
            elif first.kind in ("flip", "rounding") and found.kind == "own":
                larger = found
                break
        if larger is not None or (first is not None and first.kind in ("own", "inherited")):
            break
    if number == 0:
        raise QatkitError("there are no batches to compare layers for", key="batches", advice="pass at least one batch")
    layers = len(compared - {OUTPUTS})
    text = _text(row, layers, number, first, larger, skipped)
    return Explanation(row.name, layers, number, first, larger, skipped, text)


def _text(
    row: ExportFormat,
    layers: int,
    batches: int,
    first: LayerDifference | None,
    larger: LayerDifference | None,
    skipped: dict[str, str],
) -> str:
    over = f"the outputs of {layers} layers {{}} over {batches} batches"
    if first is None:
        same = "are equal, except for rounding," if row.rounding else "are equal"
        text = f"no layer differs: {over.format(same)}"
    else:
        text = f"the first output that differs is {_of(first)}"
        if larger is not None:
            text += f". The first larger difference is {_of(larger)}"
        elif first.kind in ("flip", "rounding"):
            text += ". No layer differs by more"
    if skipped:
        name, reason = next(iter(skipped.items()))
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        text += f". Not compared: '{name}' ({reason}){more}"
    return text


def _of(difference: LayerDifference) -> str:
    return difference.text if difference.layer == OUTPUTS else f"that of {difference.text}"


def _pairs(
    ours: list[LayerCall], theirs: list[LayerCall], skipped: dict[str, str]
) -> Iterable[tuple[LayerCall, LayerCall]]:
    """The calls of both models, in the order of the trained one."""
    calls: dict[str, list[LayerCall]] = {}
    for one in theirs:
        calls.setdefault(one.layer, []).append(one)
    numbers = {name: sum(one.layer == name for one in ours) for name in {one.layer for one in ours}}
    for name, number in numbers.items():
        if number != (found := len(calls.get(name, []))):
            skipped[name] = f"it runs {number} times in the trained model and {found} times in the file"
    queues = {name: iter(each) for name, each in calls.items()}
    for one in ours:
        if one.layer in skipped:
            continue
        other = next(queues[one.layer])
        if (problem := _unlike(one, other)) is not None:
            skipped[one.layer] = problem
        else:
            yield one, other


def _unlike(one: LayerCall, other: LayerCall) -> str | None:
    for what, ours, theirs in (("output", one.output, other.output), ("input", _inputs(one), _inputs(other))):
        try:
            distances(ours, theirs)
        except ValueError as error:
            return f"{what}: {error}"
    return None


def _inputs(one: LayerCall) -> Any:
    return [one.arguments, one.keywords]


def _difference(model: nn.Module, one: LayerCall, other: LayerCall, scheme: str) -> LayerDifference | None:
    apart = distances(one.output, other.output)
    largest = max(most for _, most in apart.values())
    if largest == 0:  # NaN differs
        return None
    input_error = max([most for _, most in distances(_inputs(one), _inputs(other)).values()], default=0.0)
    tolerance = _tolerance(one.output)
    own, flips = 0.0, 0.0
    if one.layer != OUTPUTS:
        layer = model.get_submodule(one.layer)
        again = layer.forward(*other.arguments, **other.keywords)
        own = max(most for _, most in distances(again, other.output).values())
        flips = _flips(layer, other)
    kind: Kind
    if not own <= max(tolerance, flips):  # NaN is larger
        kind = "own"
    elif largest <= tolerance:
        kind = "rounding"
    elif own > tolerance or (one.layer != OUTPUTS and input_error <= _tolerance(_inputs(one))):
        kind = "flip"
    else:
        kind = "inherited"
    values = tensors(one.output).values()
    count = max(sum(value.numel() for value in values), 1)
    return LayerDifference(
        layer=one.layer,
        scheme=scheme,
        kind=kind,
        mean_error=sum(total for total, _ in apart.values()) / count,
        max_error=largest,
        mean_output=sum(float(value.abs().double().sum()) for value in values) / count,
        input_error=input_error,
    )


def _tolerance(values: Any) -> float:
    """The largest difference that a different summation order makes."""
    found = [value for value in tensors(values).values() if is_number(value) and value.numel()]
    return max([float(value.abs().max()) * max(ROUNDING, 4 * _epsilon(value)) for value in found], default=0.0)


def _epsilon(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps


def _flips(layer: nn.Module, one: LayerCall) -> float:
    """The largest difference that a few changed codes of the input make; 0 if the input is not quantized here."""
    if not isinstance(layer, QATLayer) or layer.input_fake_quant is None or layer.input_on_grid:
        return 0.0
    scale, _ = layer.input_fake_quant.qparams(one.arguments[0])
    number = max(1.0, FLIPS * layer.matrix[0].numel())
    return number * float(scale.max()) * float(layer.matrix.abs().max())


def _scheme(weight: Any) -> Scheme:
    specs = [each and each.spec for each in (weight.weight_fake_quant, weight.input_fake_quant)]
    return Scheme(*specs)


def scheme_words(scheme: Scheme) -> str:
    """Return the name of a scheme in `SCHEMES`, or a description; observers are ignored.

    Example:
        >>> scheme_words(SCHEMES["Q4_0"]), scheme_words(Scheme(QuantSpec(4, strategy="group", group_size=48)))
        ('Q4_0', '4-bit int weight per group of 48')
    """
    parts = {"weight": scheme.weight, "input": scheme.activation}
    fields = {part: _fields(spec) for part, spec in parts.items()}
    for name, known in SCHEMES.items():
        if {"weight": _fields(known.weight), "input": _fields(known.activation)} == fields:
            return name
    return ", ".join(
        f"{spec.num_bits}-bit {spec.type} {part} per {spec.strategy}"
        + (f" of {spec.group_size}" if spec.group_size else "")
        for part, spec in parts.items()
        if spec is not None
    )


def _fields(spec: QuantSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {key: value for key, value in asdict(spec).items() if key not in ("observer", "percentile")}
