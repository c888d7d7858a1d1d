"""Save adapters in peft's format."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from qatkit.common.files import naming
from qatkit.errors import QatkitError
from qatkit.lora.attachment import adapted_layers, adapter_of, factors_of, peft_config
from qatkit.lora.heads import classification_heads, inside_of
from qatkit.lora.layers import AdaptedWeight
from qatkit.quantization.modules import full_tensor
from qatkit.quantization.state import quantizer_prefixes


def save_adapter(model: nn.Module, folder: Path, base: str = "") -> None:
    """Save the adapters of a model in peft's format, which `PeftModel.from_pretrained(base_model, folder)` loads.

    Args:
        model: A model with adapters. peft finds layers by their names in this model.
        folder: Output folder; created if it does not exist.
        base: The base model's name, stored in the config.

    Raises:
        QatkitError: there are no adapters, or a layer has a sparsity mask, which peft would ignore when merging.
    """
    from safetensors.torch import save_file

    layers = adapted_layers(model)
    if not layers:
        raise QatkitError("the model has no adapter", key="model", advice="call save_adapter before merge")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedWeight) and layer.held:
            raise QatkitError(
                f"layer '{name}' has a sparsity mask, which merging with peft would ignore",
                key="model",
                advice="use merge instead",
            )
        for key, value in factors_of(layer).items():
            tensors[f"base_model.model.{name}.{key}"] = full_tensor(value).detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    heads, quantizers = classification_heads(model), quantizer_prefixes(model)
    for key, value in model.state_dict().items():
        if inside_of(key, heads) and not key.startswith(quantizers):
            tensors[f"base_model.model.{key}"] = full_tensor(value).detach().cpu().contiguous().clone()
    config = peft_config(list(layers), adapter_of(next(iter(layers.values()))))
    config.modules_to_save = heads or None
    config.base_model_name_or_path, config.inference_mode = base, True
    with naming(folder):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        # peft would write its sets in a different order on each run
        content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        (folder / "adapter_config.json").write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
