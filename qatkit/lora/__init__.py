"""Low-rank adapters (LoRA, QLoRA, DoRA), attached with peft or, for quantized or sparse weights, inside the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.lora.adapter_files import save_adapter as save_adapter
    from qatkit.lora.attachment import Adapter as Adapter
    from qatkit.lora.attachment import adapted_layers as adapted_layers
    from qatkit.lora.attachment import attach as attach
    from qatkit.lora.attachment import merge as merge
    from qatkit.lora.attachment import target_layers as target_layers
    from qatkit.lora.bits import dequantized as dequantized
    from qatkit.lora.bits import quantize_base as quantize_base
    from qatkit.lora.layers import AdaptedLinear as AdaptedLinear
    from qatkit.lora.layers import AdaptedQATLinear as AdaptedQATLinear

_HOMES = {
    "qatkit.lora.attachment": ["Adapter", "adapted_layers", "attach", "merge", "target_layers"],
    "qatkit.lora.adapter_files": ["save_adapter"],
    "qatkit.lora.bits": ["dequantized", "quantize_base"],
    "qatkit.lora.layers": ["AdaptedLinear", "AdaptedQATLinear"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
