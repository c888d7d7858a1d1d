"""Output quantizers: their placement in a model, and how to add and remove them.

The output of a layer, or of a simple module that is called once, is quantized by a hook. The output of an operation in
a module's own `forward`, such as a residual addition, is quantized by a subclass of the module's class, which counts
the operations in this `forward`. The model stays an eager model with the same parameters and names.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from qatkit.errors import QatkitError
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize
from qatkit.quantization.placement.operations import kind_of
from qatkit.spec import QuantSpec

OUTPUT, INPUTS = "output", "inputs"
SUFFIX = "_fake_quant"
_STATE = "_placed"
"""Attribute of a module with points: the `_State`."""


@dataclass(frozen=True)
class Point:
    """An output that is quantized once for all its readers."""

    module: str
    """Name of the module that contains the quantizer."""
    part: str
    """"output", "inputs", or the operation in the module's `forward`, such as "add_0"."""
    readers: tuple[str, ...] = ()
    """Layers whose input is this output."""
    repeats: str = ""
    """``module.part`` of the point with the same values before a resize, whose quantizer is reused here."""


@dataclass(frozen=True)
class Placement:
    """The points of a model, as plain data."""

    points: tuple[Point, ...] = ()
    calls: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of operations by kind that one call of a module runs itself. A `forward` that runs different operations
    raises an error.
    """
    spec: QuantSpec = field(default_factory=lambda: QuantSpec(symmetric=False, strategy="tensor"))
    """Quantization of the outputs."""

    def as_dict(self) -> dict[str, Any]:
        """Return the placement as plain data for a checkpoint or a JSON file."""
        return asdict(self)

    def renamed(self, name: Callable[[str], str]) -> Placement:
        """Return the placement for a model with different module names."""

        def part(full: str) -> str:
            module, _, last = full.rpartition(".")
            return _full(name(module), last) if full else ""

        points = (Point(name(p.module), p.part, tuple(map(name, p.readers)), part(p.repeats)) for p in self.points)
        return Placement(tuple(points), {name(module): each for module, each in self.calls.items()}, self.spec)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Placement:
        """Create a placement from the data returned by `as_dict`."""
        points = (Point(p["module"], p["part"], tuple(p["readers"]), p["repeats"]) for p in content["points"])
        return cls(tuple(points), content["calls"], QuantSpec(**content["spec"]))


@dataclass
class _State:
    """What `place` changed about a module."""

    parts: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


def place(model: nn.Module, placement: Placement) -> None:
    """Add the quantizers of a placement to a model prepared by `prepare_qat`, in place.

    A layer whose input is a point's output, with the same spec, uses the point's quantizer.

    Args:
        model: The model for which the placement was created.
        placement: The points.
    """
    spec = placement.spec
    made: dict[str, FakeQuantize] = {}
    for point in placement.points:
        module = model.get_submodule(point.module)
        first = made.get(point.repeats) if point.repeats else None
        device = next((tensor.device for tensor in model.parameters()), None)
        fake_quant = first or FakeQuantize(spec, "activation", (1,), device)
        made[_full(point.module, point.part)] = fake_quant
        module.register_module(point.part + SUFFIX, fake_quant)
        state = module.__dict__.setdefault(_STATE, _State())
        state.parts.append(point.part)
        if point.part == OUTPUT:
            module.register_forward_hook(_quantize_output)
        elif point.part == INPUTS:
            module.register_forward_pre_hook(_quantize_inputs, with_kwargs=True)
        for name in point.readers:
            layer = model.get_submodule(name)
            if (
                isinstance(layer, QATLayer)
                and layer.input_fake_quant is not None
                and layer.input_fake_quant.spec == spec
            ):
                layer.input_fake_quant = fake_quant
                layer.input_on_grid = True
    for name, calls in placement.calls.items():
        module = model.get_submodule(name)
        module.__dict__[_STATE].calls = dict(calls)
        module.__class__ = _counting(type(module))
        for part in module.modules():
            if part is not module and not _is_function(part) and _enter not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_enter)
                part.register_forward_hook(_leave, always_call=True)


def _is_function(module: nn.Module) -> bool:
    """Whether a module is one operation, which counts as one of the module that calls it, even if it has a point."""
    if not type(module).__module__.startswith("torch.nn."):
        return next(module.children(), None) is None
    return all(isinstance(child, FakeQuantize) for child in module.children())


def unplace(model: nn.Module) -> None:
    """Undo `place`, in place."""
    own = (_quantize_output, _quantize_inputs, _enter, _leave)
    for module in list(model.modules()):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in own]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if (state := module.__dict__.pop(_STATE, None)) is not None:
            for part in state.parts:
                module._modules.pop(part + SUFFIX, None)
        if isinstance(module, _Counting):
            module.__class__ = cast("type[_Counting]", type(module).plain)
        if isinstance(module, QATLayer):
            module.input_on_grid = False


def placement_of(model: nn.Module) -> Placement:
    """Return the placement of a model, with names relative to it; empty if it has none."""
    points: list[Point] = []
    calls: dict[str, dict[str, int]] = {}
    first: dict[int, str] = {}
    specs: list[QuantSpec] = []
    readers: dict[int, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QATLayer) and layer.input_on_grid:
            readers.setdefault(id(layer.input_fake_quant), []).append(name)
    for name, module in model.named_modules():
        state = module.__dict__.get(_STATE)
        for part in [] if state is None else state.parts:
            fake_quant = cast(FakeQuantize, module._modules[part + SUFFIX])
            specs.append(fake_quant.spec)
            full = _full(name, part)
            again = first.setdefault(id(fake_quant), full)
            read = () if again != full else tuple(readers.get(id(fake_quant), []))
            points.append(Point(name, part, read, "" if again == full else again))
        if state is not None and state.calls:
            calls[name] = dict(state.calls)
    return Placement(tuple(points), calls, specs[0]) if specs else Placement()


def _full(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def point_parts(module: nn.Module) -> list[str]:
    """Return the parts of a module whose outputs are quantized, such as "output" or "add_0"."""
    state = module.__dict__.get(_STATE)
    return [] if state is None else list(state.parts)


# the counters of the counting modules that run now, innermost last; None while a part runs that is not one
_running: list[_Counter | None] = []


class _Counter(TorchFunctionMode):
    """Counts the operations of a module's `forward` and quantizes the results that have a point."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: dict[str, int] = module.__dict__[_STATE].calls
        self.counted: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _running[-1] is not self:
            return out
        kind = kind_of(func)
        if kind not in self.calls:
            return out
        part = f"{kind}_{self.counted[kind]}{SUFFIX}"
        self.counted[kind] += 1
        fake_quant = self.module._modules.get(part)
        return out if fake_quant is None else _quantized(fake_quant, out)


class _Counting(nn.Module):
    """Base of the classes that count the operations of their `forward`."""

    plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).plain,), self.__dict__  # the class itself has no importable name


_CLASSES: dict[type[nn.Module], type[_Counting]] = {}


def _counting(kind: type[nn.Module]) -> type[_Counting]:
    if issubclass(kind, _Counting):
        return kind
    if kind not in _CLASSES:

        @functools.wraps(kind.forward)  # torch.export and Lightning read the signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            counter = _Counter(self)
            _running.append(counter)
            try:
                with counter:
                    out = kind.forward(self, *args, **kwargs)
            finally:
                _running.pop()
            if counter.counted != counter.calls:
                raise QatkitError(
                    f"{kind.__name__}.forward ran the operations {dict(counter.counted)}, but it ran {counter.calls} "
                    "when its activation quantizers were placed",
                    key="target",
                    advice="make forward run the same operations on every call, or exclude the layers of this module",
                )
            return out

        made = type(
            kind.__name__, (_Counting, kind), {"forward": forward, "plain": kind, "__module__": kind.__module__}
        )
        _CLASSES[kind] = made
    return _CLASSES[kind]


def _new(kind: type[nn.Module]) -> nn.Module:
    made = _counting(kind)
    return made.__new__(made)


def _enter(*_: Any) -> None:
    _running.append(None)


def _leave(*_: Any) -> None:
    _running.pop()


@contextmanager
def _uncounted() -> Iterator[None]:
    _running.append(None)
    try:
        yield
    finally:
        _running.pop()


def _quantized(fake_quant: nn.Module, value: Any) -> Any:
    with _uncounted():
        return tree_map(lambda x: fake_quant(x) if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _quantize_output(module: nn.Module, args: Any, out: Any) -> Any:
    return _quantized(cast(nn.Module, module._modules[OUTPUT + SUFFIX]), out)


def _quantize_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    fake_quant = cast(nn.Module, module._modules[INPUTS + SUFFIX])
    return _quantized(fake_quant, args), _quantized(fake_quant, kwargs)
