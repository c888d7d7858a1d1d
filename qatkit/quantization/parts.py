"""Base class of modules with multiple weights, such as multi-head attention, recurrent layers and fused experts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from qatkit.quantization.modules import FakeQuantize


class QATParts(nn.Module):
    """A module with multiple fake-quantized weights, each of which is a named part.

    The fake quantizer of part ``q_proj`` is ``q_proj_fake_quant``; the fake quantizer of its input is
    ``q_proj_input_fake_quant``.
    """

    kind: ClassVar[str]
    """The kind of layer, for messages."""

    def part_names(self) -> tuple[str, ...]:
        """Return the names of the parts; also works for the plain module."""
        raise NotImplementedError

    def parameter(self, part: str) -> Tensor | None:
        """Return the tensor that contains a part's weight; also works for the plain module."""
        raise NotImplementedError

    def matrix(self, part: str) -> Tensor:
        """Return a part's latent weight ``[out, in]``; also works for the plain module."""
        raise NotImplementedError

    def part_bias(self, part: str) -> Tensor | None:
        """Return the bias ``[out]`` that is quantized with a part's product, or None."""
        return None

    def shipped(self) -> dict[str, Tensor]:
        """Return the fake-quantized parameters used in the forward pass, by parameter name."""
        raise NotImplementedError

    def weight_quantizer(self, part: str) -> FakeQuantize | None:
        """Return the fake quantizer of a part's weight, or None."""
        return self._quantizer(f"{part}_fake_quant")

    def input_quantizer(self, part: str) -> FakeQuantize | None:
        """Return the fake quantizer of a part's input, or None."""
        return self._quantizer(f"{part}_input_fake_quant")

    def _quantizer(self, name: str) -> FakeQuantize | None:
        fake_quant = self._modules.get(name)
        assert fake_quant is None or isinstance(fake_quant, FakeQuantize)
        return fake_quant

    def with_scale(self, part: str) -> tuple[Tensor, Tensor | None]:
        """Return a part's weight ``[out, in]`` as used in the forward pass, and its scale."""
        fake_quant = self.weight_quantizer(part)
        return (self.matrix(part), None) if fake_quant is None else fake_quant.with_scale(self.matrix(part))

    def plain_class(self) -> type[nn.Module]:
        """Return the class of the module before the swap."""
        kinds = type(self).__mro__
        return next(kind for kind in kinds if issubclass(kind, nn.Module) and not issubclass(kind, QATParts))
