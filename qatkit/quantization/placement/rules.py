"""Rules that select the outputs to quantize so that ONNX Runtime or OpenVINO computes with integers.

A convolution uses an integer kernel only if its output is also quantized. An addition, multiplication, concatenation or
pooling uses one only if all its inputs and its output are quantized. Every output has one quantizer, after the ReLU
that is fused into the integer kernel, and all its readers share the scale. The integer kernel of a linear layer returns
floating-point values. Its output therefore stays unquantized, and so do additions that read such an output, such as the
residual stream of a transformer.

OpenVINO's convolutions may return floating-point values (`float_outputs`). It computes the activation function that
follows, and one residual addition, inside the convolution's kernel, and skips the rounding before that addition. The
operand that comes from the convolution is therefore not quantized, and other outputs are quantized only if an integer
kernel reads them.

The linear layers of LiteRT and ExecuTorch write codes (`linear_codes`), like convolutions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from qatkit.quantization.placement.operations import (
    ACTIVATION,
    ADD,
    CONV,
    INTEGER,
    LINEAR,
    RELU,
    RESIZE,
    SAME,
)
from qatkit.quantization.placement.points import INPUTS, OUTPUT, Placement, Point
from qatkit.quantization.placement.recorder import Call, Recording
from qatkit.quantization.targets import Target
from qatkit.spec import QuantSpec

Place = tuple[str, str]
"""A module, and the part of it that has a quantizer."""
_KEEPS = (SAME, RESIZE)


def decide(recording: Recording, layers: Iterable[str], spec: QuantSpec, target: Target) -> Placement:
    """Return the outputs to quantize in addition to layer inputs.

    Args:
        recording: One forward pass of the model.
        layers: Names of the layers whose weights and inputs will be quantized.
        spec: Quantization of the outputs, with ``strategy: tensor``.
        target: The runtime.
    """
    return _Rules(recording, set(layers), target).placement(spec)


class _Rules:
    def __init__(self, recording: Recording, layers: set[str], target: Target) -> None:
        self.recording = recording
        self.layers = layers
        self.float_outputs = target.float_outputs
        self.coded = (CONV, LINEAR) if target.linear_codes else (CONV,)  # layers whose kernels write codes
        self.source = recording.calls[0]
        self._resized = {call for call in recording.calls if call.kind == RESIZE}  # values that may be interpolated
        self._able: dict[Call, bool] = {}
        for call in recording.calls:  # in order, so that the inputs of a call are known
            self._able[call] = self._is_able(call)
        self._needed: dict[Call, bool] = {}
        for call in reversed(recording.calls):
            self._needed[call] = any(self._needs(user) for user in _users(call))
        self._unrounded = {
            part
            for call in recording.calls
            if target.float_outputs and call.kind == ADD and self._able[call] and self._needed[call]
            for part in self._fused_operand(call)
        }

    def placement(self, spec: QuantSpec) -> Placement:
        points: dict[Call, Place] = {}
        again: dict[Call, Call] = {}
        for call in self.recording.calls[1:]:
            place = self._place(call)
            if place is not None and self._is_quantized(call):
                points[call] = place
            elif place is not None and call.kind == RESIZE and self._needed[call] and self._origin(call) in points:
                points[call], again[call] = place, self._origin(call)
        readers: dict[Place, list[str]] = {}
        for layer, origin in self._sources(points).items():
            if origin is not None:
                readers.setdefault(origin, []).append(layer)
        inputs = self._input_places()
        made = {place: Point(*place, (), _name(inputs[0]) if place != inputs[0] else "") for place in inputs}
        for call, place in points.items():
            if place not in made:  # a layer that is called twice has one quantizer
                repeats = _name(points[again[call]]) if call in again else ""
                made[place] = Point(*place, tuple(readers.get(place, [])), repeats)
        calls = {
            module: {kind: count for kind, count in self.recording.counts[module].items() if kind in kinds}
            for module, kinds in _kinds(made).items()
        }
        return Placement(tuple(made.values()), calls, spec)

    def _is_able(self, call: Call) -> bool:
        """Whether a call can run with integers: everything that it reads comes from such a call, or is an input."""
        if call is self.source:
            return True
        if call.kind in self.coded:
            return call.module in self.layers
        if call.kind in (*_KEEPS, RELU, ACTIVATION):
            return bool(call.inputs) and self._able[call.inputs[0]]
        if call.kind in INTEGER and not call.constant and self._place(call) is not None:
            return bool(call.inputs) and all(self._able[each] and self._can_read(call, each) for each in call.inputs)
        return False

    def _can_read(self, call: Call, value: Call) -> bool:
        """Whether an operation can read a value as codes; inputs are quantized where their module is called."""
        if self._origin(value) is not self.source:
            return True
        return call.owner in self.recording.single_input - self.recording.sequential

    def _needs(self, user: Call) -> bool:
        """Whether a call reads codes: then the result that it reads has to be quantized."""
        if user.kind in (CONV, LINEAR):
            return user.module in self.layers
        if user.kind == ACTIVATION:
            return self._able[user] and not self.float_outputs
        return self._able[user] and user.kind in (RELU, *INTEGER) and self._needed[user]

    def _is_quantized(self, call: Call) -> bool:
        if not self._able[call] or call.kind in _KEEPS or call in self._unrounded:
            return False
        if call.kind == ACTIVATION:  # in floating point: layers that read it quantize their input
            return any(user.kind in INTEGER and self._needs(user) for user in _users(call))
        if call.kind == RELU:
            after_layer = any(self._origin(each).kind in self.coded for each in call.inputs)
            return self._needed[call] or (after_layer and not self.float_outputs)
        users = list(_users(call))
        absorbed = len(users) == 1 == len(call.users) and users[0].kind == RELU and self._place(users[0]) is not None
        return not absorbed and (self._needed[call] or (call.kind in self.coded and not self.float_outputs))

    def _fused_operand(self, add: Call) -> list[Call]:
        """Return the calls that make one operand of an addition: a convolution and its activation function.

        The addition is fused into the convolution if nothing else reads the operand. If both operands qualify, it is
        fused into the one that is not quantized.
        """
        for operand in reversed(add.inputs):
            calls = [operand]
            while len(calls[-1].users) == 1 and calls[-1].kind in (SAME, RELU, ACTIVATION) and calls[-1].inputs:
                calls.append(calls[-1].inputs[0])
            if len(calls[-1].users) == 1 and calls[-1].kind == CONV:
                return calls
        return []

    def _place(self, call: Call) -> Place | None:
        """Return the module and the part of it that can quantize the result, or None if none can."""
        module, times = call.module, self.recording.times
        if module is not None and (
            module in self.layers or times[module] == 1 or call.owner in self.recording.sequential
        ):
            return module, OUTPUT
        return None if call.owner in self.recording.irregular else (call.owner, f"{call.kind}_{call.index}")

    def _input_places(self) -> list[Place]:
        """Return where the model's inputs are quantized for operations; layers quantize what they read themselves."""
        users = [user for user in _users(self.source) if user.kind in INTEGER and self._needs(user)]
        return list(dict.fromkeys((user.owner, INPUTS) for user in users))

    def _sources(self, points: dict[Call, Place]) -> dict[str, Place | None]:
        """Return the point whose values a layer reads; None if it reads other values as well."""
        found: dict[str, Place | None] = {}
        for call in self.recording.calls:
            if call.module in self.layers and call.inputs:
                place = points.get(self._origin(call.inputs[0], stop=(*points, *self._resized)))
                found[call.module] = place if found.get(call.module, place) == place else None
        return found

    def _origin(self, call: Call, stop: Collection[Call] = ()) -> Call:
        """Return the call that made the values that a result holds, or the first one in `stop` on the way."""
        while call.kind in _KEEPS and call.inputs and call not in stop:
            call = call.inputs[0]
        return call


def _users(call: Call) -> Iterable[Call]:
    """Yield the calls that read a result, also behind calls that keep its values."""
    for user in call.users:
        if user.kind in _KEEPS:
            yield from _users(user)
        else:
            yield user


def _name(place: Place) -> str:
    return ".".join(filter(None, place))


def _kinds(points: Iterable[Place]) -> dict[str, set[str]]:
    """Return the kinds of operations that have points, by module."""
    kinds: dict[str, set[str]] = {}
    for module, part in points:
        if part not in (OUTPUT, INPUTS):
            kinds.setdefault(module, set()).add(part.rpartition("_")[0])
    return kinds
