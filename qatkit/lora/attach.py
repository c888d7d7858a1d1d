"""Put adapters on the layers of a model, save them as peft does, and merge them."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.lora.bits import dequantized, kind_of, make_safe, set_child
from qatkit.lora.heads import check_heads, classification_heads, inside_of
from qatkit.lora.layers import SWAPS, AdaptedWeight, adapt, merge_layer
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.state import quantizer_prefixes

NAME = "default"
"""What peft calls the adapter."""


@dataclass(frozen=True)
class Adapter:
    """The shape of an update ``alpha / rank * B A``."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Share of the inputs of A that are dropped while training."""
    dora: bool = False
    """Learn the length of every output's weights apart from their direction (https://arxiv.org/abs/2402.09353)."""


def target_layers(model: nn.Module, targets: Sequence[str] = ("*",)) -> list[str]:
    """The linear layers that the globs select, in the model's order.

    The output layer of a language model is only taken by a pattern that names it, and the head of a classifier by none,
    as it is trained whole.

    Raises:
        QatkitError: a pattern matches no linear layer, or a layer whose weight belongs to another one as well.

    Example:
        >>> target_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        ['0', '2']
    """
    whole = classification_heads(model)
    linear = {
        name: module for name, module in model.named_modules() if _is_linear(module) and not inside_of(name, whole)
    }
    heads = _heads(model)
    uses: dict[int, str] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None and name not in linear:
            uses.setdefault(id(weight), name)
    for index, pattern in enumerate(targets):
        found = [name for name in linear if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, linear, n=3, cutoff=0.3) or list(linear)[:3]
            known = f"the nearest are {near}" if near else "the model has none"
            known += f"; {whole} is trained whole" if any(inside_of(pattern, whole) for pattern in targets) else ""
            raise QatkitError(f"targets[{index}]: '{pattern}' matches no linear layer; {known}")
    chosen = []
    for name, module in linear.items():
        if not any(_takes(pattern, name, module in heads) for pattern in targets):
            continue
        tied = uses.setdefault(id(module.weight), name)
        if tied != name:
            raise QatkitError(
                f"targets: layer '{name}' has one weight with '{tied}', which a merge would change with it; write "
                "patterns that leave it out"
            )
        chosen.append(name)
    if not chosen:
        raise QatkitError(f"targets: {list(targets)} leaves no layer; name the layer itself, such as '*.q_proj'")
    return chosen


def base_layers(model: nn.Module) -> list[str]:
    """The layers that few bits may hold: plain linear ones, but no output layer, no head and no shared weight."""
    heads, whole = _heads(model), classification_heads(model)
    owners = Counter(
        id(weight) for module in model.modules() if (weight := module._parameters.get("weight")) is not None
    )
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module not in heads
        and not inside_of(name, whole)
        and owners[id(module.weight)] == 1
    ]


def attach(model: nn.Module, names: Sequence[str], adapter: Adapter, held: Collection[str] = ()) -> None:
    """Freeze a model and put adapters on some of its layers, in place; it computes what it did.

    Layers are peft's, unless one of them is fake-quantized or keeps its zeros: then all are `AdaptedWeight`, whose
    update is part of the weight. Scales of fake quantizers stay trainable, and so does the head of a classifier of
    transformers: where the model was not trained to classify, its weights are random.

    Args:
        model: Any module.
        names: What `target_layers` gave.
        adapter: The shape of the updates.
        held: Layers whose zeros stay zeros.

    Raises:
        QatkitError: the adapter or a layer's type does not go with an update inside the weight.
    """
    layers = {name: model.get_submodule(name) for name in names}
    heads = classification_heads(model)
    check_heads(heads, held)
    inside = bool(held) or any(isinstance(layer, QATLayer) for layer in layers.values())
    if inside:
        check_inside(layers, adapter, bool(held))
    scales = [p for module in model.modules() if isinstance(module, FakeQuantize) for p in module.parameters()]
    trained = [p for p in scales if p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    make_safe(model)
    if inside:
        for name, layer in layers.items():
            adapt(layer, adapter.rank, adapter.alpha, name in held)
    else:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype

        # under another root: under FSDP2 peft takes a LightningModule, which knows a device mesh, for a model of
        # transformers, and asks for its config
        root = nn.ModuleDict({"root": model})
        inject_adapter_in_model(_config([f"root.{name}" for name in names], adapter), root)
        cast_adapter_dtype(root, NAME)  # as get_peft_model does: factors of 16 bits lose steps of a usual learning rate
    for parameter in (*trained, *(p for name in heads for p in model.get_submodule(name).parameters())):
        parameter.requires_grad_(True)


def check_inside(layers: dict[str, nn.Module], adapter: Adapter, held: bool) -> None:
    """Raise unless the updates can be part of the weights."""
    why = "whose zeros are held" if held else "that is quantized in the same stage"
    for key in ("dora", "dropout"):
        if value := getattr(adapter, key):
            raise QatkitError(
                f"{key}: {value} does not go with a layer {why}, where the update is part of the weight; leave it out"
            )
    for name, layer in layers.items():
        if kind_of(layer) is not None:
            raise QatkitError(
                f"layer '{name}': its weight is frozen in {kind_of(layer)} bits, and cannot be one {why}; write "
                "bits: null, or merge the adapters in a stage of their own before"
            )
        if type(layer) not in SWAPS:
            raise QatkitError(
                f"layer '{name}': a {type(layer).__name__} {why} cannot be adapted (only nn.Linear can); write targets "
                "that leave it out"
            )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold adapters, peft's and qatkit's own, by name."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


def save_adapter(model: nn.Module, folder: Path, base: str = "") -> None:
    """Write the adapters of a model in peft's own format: `PeftModel.from_pretrained(base_model, folder)` loads them.

    Args:
        model: A model with adapters, and the root of the names that peft will look for.
        folder: Made if it does not exist.
        base: What the config names as the base model.

    Raises:
        QatkitError: there is no adapter, or the zeros of a layer are held: peft would fill them.
    """
    from safetensors.torch import save_file

    layers = adapted_layers(model)
    if not layers:
        raise QatkitError("save_adapter: the model has no adapter; call it before merging")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedWeight) and layer.held:
            raise QatkitError(f"save_adapter: layer '{name}' keeps its zeros, which peft would fill; merge instead")
        for key, value in _factors(layer).items():
            tensors[f"base_model.model.{name}.{key}"] = full_tensor(value).detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    heads, quantizers = classification_heads(model), quantizer_prefixes(model)
    for key, value in model.state_dict().items():
        if inside_of(key, heads) and not key.startswith(quantizers):
            tensors[f"base_model.model.{key}"] = full_tensor(value).detach().cpu().contiguous().clone()
    config = _config(list(layers), _adapter_of(next(iter(layers.values()))))
    config.modules_to_save = heads or None
    config.base_model_name_or_path, config.inference_mode = base, True
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # written here: peft would write its sets in another order on every run
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")


def merge(model: nn.Module, device: torch.device | None = None) -> list[str]:
    """Put every update into its weight and take the adapters away, in place.

    A base of 4 or 8 bits becomes plain layers of full precision first, with exactly the values it stands for: an update
    rounded back to so few bits would be lost. What is fake-quantized stays so.

    Args:
        model: A model with adapters.
        device: Where to compute updates inside the weight; by default where the weight is.

    Returns:
        The names of the merged layers.
    """
    to_full_precision(model)
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedWeight):
            merge_layer(layer, device)
            continue
        peft_layer: Any = layer
        peft_layer.merge()
        set_child(model, name, peft_layer.get_base_layer())
    return list(layers)


def to_full_precision(model: nn.Module) -> None:
    """Replace layers of 4 or 8 bits by plain ones with the same values, adapters and all, in place."""
    for name, layer in adapted_layers(model).items():
        base = None if isinstance(layer, AdaptedWeight) else layer.get_base_layer()  # type: ignore[operator]
        if base is not None and kind_of(base) is not None:
            set_child(model, name, _over_plain_base(layer, base))
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None:
            set_child(model, name, dequantized(module))


def _over_plain_base(layer: nn.Module, base: nn.Module) -> nn.Module:
    """The same adapter over the plain layer that the base stands for."""
    holder = nn.ModuleDict({"layer": dequantized(base)})
    attach(holder, ["layer"], _adapter_of(layer))
    with torch.no_grad():
        for key, value in _factors(holder["layer"]).items():
            value.data = _factors(layer)[key].detach()
    return holder["layer"]


def _factors(layer: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of an adapter, by the names of peft's files."""
    if isinstance(layer, AdaptedWeight):
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    found = {f"{part}.weight": getattr(layer, part)[NAME].weight for part in ("lora_A", "lora_B")}
    if NAME in layer.lora_magnitude_vector:  # type: ignore[operator]
        found["lora_magnitude_vector"] = layer.lora_magnitude_vector[NAME].weight  # type: ignore[index, union-attr]
    return found


def _adapter_of(layer: Any) -> Adapter:
    if isinstance(layer, AdaptedWeight):
        return Adapter(layer.lora_A.shape[0], layer.lora_alpha)
    return Adapter(layer.r[NAME], layer.lora_alpha[NAME], 0.0, NAME in layer.lora_magnitude_vector)


def _config(names: list[str], adapter: Adapter) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft takes fractions as well
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=names,
        bias="none",
    )


def _is_linear(module: nn.Module) -> bool:
    # peft's layers are no nn.Linear themselves; their factors are, and must not be adapted again
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "QATConv1D")


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedWeight) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))


def _heads(model: nn.Module) -> set[nn.Module]:
    found = set()
    for module in model.modules():
        if callable(getter := getattr(module, "get_output_embeddings", None)):
            try:
                found.add(getter())
            except (NotImplementedError, AttributeError):  # a part of a model has none
                continue
    return found - {None}


def _takes(pattern: str, name: str, head: bool) -> bool:
    # the last part of `*` or `model.*` names every layer, and none in particular
    return fnmatchcase(name, pattern) and not (head and set(pattern.rpartition(".")[2]) <= {"*", "?"})
