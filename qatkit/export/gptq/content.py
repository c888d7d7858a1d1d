"""The content of an exported folder: the packed arrays of every quantized layer, and the quantization config."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.export.gptq.layouts import Layout
from qatkit.export.gptq.limits import quantized_places
from qatkit.export.interface import PlannedExport
from qatkit.quantization.arithmetic import quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import full_tensor
from qatkit.spec import QuantSpec


def weight_spec(layer: QATLayer) -> QuantSpec:
    """Return the quantization of a layer's weight."""
    assert layer.weight_fake_quant is not None
    return layer.weight_fake_quant.spec


@torch.no_grad()
def unsigned_parts(layer: QATLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return unsigned codes ``[out, in]``, and unsigned zero points and float16 scales ``[out, groups]``.

    A symmetric weight has the zero point ``2**(bits - 1)``.
    """
    spec, matrix = weight_spec(layer), full_tensor(layer.matrix)
    scale, zero_point = cast(Any, layer.weight_fake_quant).whole_qparams(matrix)
    offset = 2 ** (spec.num_bits - 1) if spec.symmetric else 0
    codes, zeros = (
        (part.to(torch.int16) + offset).to(torch.uint8).cpu()
        for part in (quantize(matrix, scale, zero_point, spec), zero_point)
    )
    scales = scale.to(torch.float16).cpu()
    assert torch.equal(scales.float(), scale.cpu()), "training rounds the scales to float16"
    return codes, zeros.expand(scales.shape), scales


def packed_arrays(layer: QATLayer, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors of the file that take the place of a layer's weight, by suffix."""
    codes, zeros, scales = unsigned_parts(layer)
    made = layout.arrays(codes.numpy(), scales.numpy(), zeros.numpy(), weight_spec(layer))
    words = {name: array.view(np.int32) if array.dtype == np.uint32 else array for name, array in made.items()}
    return {name: torch.from_numpy(array) for name, array in words.items()}


def quantization_config(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return the ``quantization_config`` of ``config.json``; empty if no layer is quantized."""
    schemes = PlannedExport.of(model).schemes
    if not schemes:
        return {}
    spec = cast(QuantSpec, next(iter(schemes.values())).weight)
    config = layout.config(spec, quantized_places(model, schemes, layout))
    return {"quant_method": layout.name, **config}
