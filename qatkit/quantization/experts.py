"""Fused experts of mixture-of-experts models: one three-dimensional parameter for each projection of all experts.

transformers 5 holds them so, and computes with them in several ways (a loop, a batched or a grouped product). All of
them read the parameter as an attribute of the module, so that is where it is rounded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qatkit.quantization.modules import FakeQuantize


class QATExperts(nn.Module):
    """Fused experts over fake-quantized weights; a channel is an output of one expert.

    A weight is rounded once per forward pass, however often its experts read it.
    """

    projections: tuple[str, ...]
    is_transposed: bool

    def matrix(self, name: str) -> Tensor:
        """A projection's unrounded weights, ``[experts * out, in]``."""
        weight = self._parameters[name]
        assert weight is not None
        return (weight.transpose(1, 2) if self.is_transposed else weight).flatten(0, 1)

    def fake_quant(self, name: str) -> FakeQuantize:
        """The fake quantizer of a projection."""
        fake_quant = self._modules[f"{name}_fake_quant"]
        assert isinstance(fake_quant, FakeQuantize)
        return fake_quant

    def rounded(self, name: str) -> Tensor:
        """A projection's weights as the forward pass uses them, in the parameter's shape and dtype."""
        kept: dict[str, Tensor] | None = self.__dict__.get("_rounded")
        if kept is not None and name in kept:
            return kept[name]
        weight = self._parameters[name]
        assert weight is not None
        value: Tensor = self.fake_quant(name)(self.matrix(name))
        experts, first, second = weight.shape
        value = value.view(experts, second, first).transpose(1, 2) if self.is_transposed else value.view_as(weight)
        if kept is not None:
            kept[name] = value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            _new_experts,
            (plain_class(self), self.projections),
            self.__dict__,
        )  # the class itself has no importable name

    def shipped(self) -> dict[str, Tensor]:
        """The projections as the forward pass uses them, by parameter name."""
        return {name: self.rounded(name) for name in self.projections}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_rounded"] = {}
        try:
            return super().forward(*args, **kwargs)  # the class that was swapped comes next
        finally:
            del self.__dict__["_rounded"]


def is_experts(module: nn.Module) -> bool:
    """Whether a module is plain fused experts as transformers 5 marks them."""
    return not isinstance(module, QATExperts) and hasattr(module, "is_transposed") and bool(expert_weights(module))


def expert_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The projections of fused experts: direct parameters of three dimensions."""
    return [(name, p) for name, p in module._parameters.items() if p is not None and p.dim() == 3]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[QATExperts]] = {}


def experts_class(kind: type[nn.Module], projections: tuple[str, ...]) -> type[QATExperts]:
    """The quantized subclass of an experts class, whose projections read as rounded weights; one for each."""

    def reader(name: str) -> property:
        # outside of the forward pass it reads as the parameter: FSDP2 looks there for what it shards
        return property(lambda self: self.rounded(name) if "_rounded" in self.__dict__ else self._parameters[name])

    if (kind, projections) not in _CLASSES:
        members: dict[str, Any] = {"projections": projections, "__doc__": QATExperts.__doc__}
        members |= {name: reader(name) for name in projections}
        _CLASSES[kind, projections] = type(f"QAT{kind.__name__}", (QATExperts, kind), members)
    return _CLASSES[kind, projections]


def _new_experts(kind: type[nn.Module], projections: tuple[str, ...]) -> QATExperts:
    made = experts_class(kind, projections)
    return made.__new__(made)


def plain_class(module: QATExperts) -> type[nn.Module]:
    """The class that a swapped experts module had."""
    kind = type(module).__mro__[2]
    assert issubclass(kind, nn.Module)
    return kind
