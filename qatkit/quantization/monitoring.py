"""Statistics of a layer's weights and scales during training, without device synchronization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatkit.quantization.grids import grid_of
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.measure import measure_weight
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.prepare import QATWeight, qat_weights

SAMPLE = 2**16
"""Maximum number of measured weights per layer; in larger layers, evenly spaced rows are sampled."""
BINS = 16
NUMBERS = ("weight_error", "clip_rate", "sparsity", "oscillation", "weight_scale", "input_scale")


class LayerWatch:
    """Measures one layer repeatedly; it keeps two bytes for each of at most `SAMPLE` weights.

    Oscillation is defined as in Nagel et al. (2022, https://arxiv.org/abs/2203.11086): the integer weight changes in
    the direction opposite to its previous change. The paper checks for oscillation at every step and keeps a running
    average of its frequency. Here, only observed steps are compared, so the fraction is a lower bound: a weight that
    changes and returns between two observations is missed.

    Example:
        >>> from qatkit import QuantSpec, prepare_qat
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = prepare_qat(model, weight=QuantSpec(num_bits=4))
        >>> dict(zip(NUMBERS, LayerWatch().observe(model[0]).tolist()))["clip_rate"]
        0.0
    """

    def __init__(self) -> None:
        self._codes: Tensor | None = None
        self._direction: Tensor | None = None  # direction of each code's last change, int8
        self._span: tuple[float, float] = (0, 0)

    @torch.no_grad()
    def observe(self, layer: nn.Module | QATWeight) -> Tensor:
        """Measure the layer now.

        Args:
            layer: A quantized layer, one of its weights, or any layer with a weight matrix. Sharded weights are
                gathered on every process.

        Returns:
            The `NUMBERS` as a float32 tensor on the layer's device. Values that do not apply to the layer are NaN:
            oscillation requires three observations, and the input scale requires a static scale.
        """
        own = QATWeight("", layer) if isinstance(layer, QATLayer) else layer
        weight = full_tensor(weight_of(own))
        every = -(-weight.numel() // SAMPLE)
        sample = weight[::every].float()
        missing = torch.full((), torch.nan, dtype=torch.float32, device=weight.device)
        if not isinstance(own, QATWeight) or (fake_quant := own.weight_fake_quant) is None:
            nothing = torch.zeros_like(missing)
            numbers = torch.stack([nothing, nothing, (sample == 0).float().mean(), missing])
            scale = None
        else:
            spec = fake_quant.spec
            # computed scales per row need the sampled rows only; any other scale needs every weight
            by_row = fake_quant.computed and spec.strategy in ("channel", "group") and not spec.two_level
            if spec.strategy == "block":
                sample = weight.float()  # a sample of rows does not align with blocks
            scale, zero_point = fake_quant.whole_qparams(sample if by_row else weight.float())
            if not by_row and spec.strategy in ("channel", "group"):
                scale, zero_point = scale[::every], zero_point[::every]
            codes, costs = measure_weight(sample, scale, zero_point, spec)
            if spec.is_float:
                codes = grid_of(spec).decode(codes, zero_point)  # bit patterns of floats do not sort by value
            numbers = torch.cat([costs, self._oscillating(codes, missing).view(1)])
            self._span = (spec.qmin, spec.qmax)
        inputs = own.input_fake_quant if isinstance(own, QATWeight) else None
        return torch.cat([numbers, torch.stack([_mean(scale, missing), _mean(_static(inputs), missing)])])

    def _oscillating(self, codes: Tensor, missing: Tensor) -> Tensor:
        """Compute the fraction of codes that changed in the direction opposite to their last change."""
        before, self._codes = self._codes, codes
        if before is None or before.shape != codes.shape:
            self._direction = None
            return missing
        change = (codes.float() - before.float()).sign().char()
        if self._direction is None:
            self._direction = change
            return missing
        turned = (change * self._direction < 0).float().mean()
        self._direction = torch.where(change == 0, self._direction, change)
        return turned

    def histogram(self) -> Tensor:
        """Return an int64 histogram of the observed codes with `BINS` equal bins over the range of codes."""
        if self._codes is None:
            return torch.zeros(BINS, dtype=torch.int64)
        low, high = self._span
        bins = ((self._codes.flatten().float() - low) * BINS / (high - low + 1)).long().clamp(max=BINS - 1)
        return torch.bincount(bins, minlength=BINS)


def weight_of(layer: nn.Module | QATWeight) -> Tensor:
    """Return the latent weight of an observed layer."""
    weight = layer.matrix if isinstance(layer, QATWeight) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def observed_layers(model: nn.Module) -> list[tuple[str, nn.Module | QATWeight]]:
    """Return the weights of quantized layers or, if there are none, modules with a weight matrix."""
    if quantized := qat_weights(model):
        return [(weight.name, weight) for weight in quantized]
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.is_floating_point()
        and weight.dim() >= 2
    ]


def _static(fake_quant: FakeQuantize | None) -> Tensor | None:
    """Return the stored scale of a quantizer, or None."""
    return None if fake_quant is None or fake_quant.scale is None else full_tensor(fake_quant.scale)


def _mean(scale: Tensor | None, missing: Tensor) -> Tensor:
    return missing if scale is None else scale.abs().mean()
