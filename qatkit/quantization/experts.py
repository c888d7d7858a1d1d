"""Fake quantization of fused experts in mixture-of-experts models.

transformers 5 stores each projection of all experts as one three-dimensional parameter, and has multiple
implementations of the product (a loop, a batched product or a grouped product). All of them read the parameter as an
attribute of the module, so this attribute returns the fake-quantized weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qatkit.quantization.parts import QATParts


class QATExperts(QATParts):
    """Fused experts with fake-quantized weights; each output of each expert is a channel.

    A weight is quantized once per forward pass, no matter how often it is read.
    """

    kind = "fused experts"
    projections: tuple[str, ...]
    is_transposed: bool

    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in expert_weights(self))

    def parameter(self, part: str) -> Tensor | None:
        return self._parameters[part]

    def matrix(self, part: str) -> Tensor:
        """Return a projection's latent weights, ``[experts * out, in]``."""
        weight = self._parameters[part]
        assert weight is not None
        return (weight.transpose(1, 2) if self.is_transposed else weight).flatten(0, 1)

    def fake_quantized(self, name: str) -> Tensor:
        """Return a projection's weights as in the forward pass, in the parameter's shape."""
        cache: dict[str, Tensor] | None = self.__dict__.get("_cache")
        if cache is not None and name in cache:
            return cache[name]
        weight = self._parameters[name]
        assert weight is not None
        value = self.with_scale(name)[0]
        experts, first, second = weight.shape
        value = value.view(experts, second, first).transpose(1, 2) if self.is_transposed else value.view_as(weight)
        if cache is not None:
            cache[name] = value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            _new_experts,
            (self.plain_class(), self.projections),
            self.__dict__,
        )  # the class itself has no importable name

    def shipped(self) -> dict[str, Tensor]:
        """Return the fake-quantized projections by parameter name."""
        return {name: self.fake_quantized(name) for name in self.projections}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_cache"] = {}
        try:
            return super().forward(*args, **kwargs)  # the class that was swapped comes next
        finally:
            del self.__dict__["_cache"]


def is_experts(module: nn.Module) -> bool:
    """Whether a module contains plain fused experts in the layout of transformers 5."""
    return not isinstance(module, QATExperts) and hasattr(module, "is_transposed") and bool(expert_weights(module))


def expert_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the projections of fused experts, which are the module's own three-dimensional parameters."""
    return [(name, p) for name, p in module._parameters.items() if p is not None and p.dim() == 3]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[QATExperts]] = {}


def experts_class(kind: type[nn.Module], projections: tuple[str, ...]) -> type[QATExperts]:
    """Return the quantized subclass of an experts class, created once per class."""

    def reader(name: str) -> property:
        # outside the forward pass the attribute is the parameter itself, which FSDP2 shards
        return property(lambda self: self.fake_quantized(name) if "_cache" in self.__dict__ else self._parameters[name])

    if (kind, projections) not in _CLASSES:
        members: dict[str, Any] = {"projections": projections, "__doc__": QATExperts.__doc__}
        members |= {name: reader(name) for name in projections}
        _CLASSES[kind, projections] = type(f"QAT{kind.__name__}", (QATExperts, kind), members)
    return _CLASSES[kind, projections]


def _new_experts(kind: type[nn.Module], projections: tuple[str, ...]) -> QATExperts:
    made = experts_class(kind, projections)
    return made.__new__(made)
