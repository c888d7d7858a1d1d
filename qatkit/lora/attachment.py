"""Attach adapters to the layers of a model, and merge them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, did_you_mean
from qatkit.lora.bits import dequantized, kind_of, make_safe, set_child
from qatkit.lora.heads import check_heads, classification_heads, inside_of
from qatkit.lora.layers import SWAPS, AdaptedWeight, adapt, merge_layer
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize

NAME = "default"
"""The name of the adapter in peft."""


@dataclass(frozen=True)
class Adapter:
    """The configuration of an update ``alpha / rank * B A``."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Dropout probability of the inputs of A during training."""
    dora: bool = False
    """Use DoRA: train the magnitude of each output's weights separately from their direction
    (https://arxiv.org/abs/2402.09353).
    """

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise QatkitError(f"{self.rank} is out of range", key="rank", advice="use a positive integer")
        if not self.alpha > 0:
            raise QatkitError(f"{self.alpha} is out of range", key="alpha", advice="use a positive number")
        if not 0 <= self.dropout < 1:
            raise QatkitError(
                f"{self.dropout} is out of range", key="dropout", advice="use a non-negative number below 1"
            )


def target_layers(model: nn.Module, targets: Sequence[str] = ("*",)) -> list[str]:
    """Return the linear layers that the globs select, in the model's order.

    The output layer of a language model is selected only by a pattern that explicitly matches its name. The head of a
    classifier is never selected, because it is trained in full.

    Raises:
        QatkitError: a pattern matches no linear layer; or a layer already has an adapter, shares its weight with
            another layer, or recomputes its weight on each call.

    Example:
        >>> target_layers(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        ['0', '2']
    """
    _refuse_adapters(model)
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
        if any(fnmatchcase(name, pattern) for name in linear):
            continue
        head = f" ({whole} is trained in full without an adapter)" if inside_of(pattern, whole) else ""
        raise QatkitError(
            f"'{pattern}' matches no linear layer{head}",
            key=f"targets[{index}]",
            advice=did_you_mean(pattern, [*dict.fromkeys(map(_by_last_part, linear)), *linear]),
        )
    chosen = []
    for name, module in linear.items():
        if not any(_takes(pattern, name, module in heads) for pattern in targets):
            continue
        tied = uses.setdefault(id(module.weight), name)
        if tied != name:
            raise QatkitError(
                f"layer '{name}' shares its weight with '{tied}', which merging would also change",
                key="targets",
                advice="use patterns that do not match the layer",
            )
        _refuse_recomputed(name, module)
        chosen.append(name)
    if not chosen:
        raise QatkitError(
            f"{list(targets)} selects no layer",
            key="targets",
            advice="use the name of the layer itself, such as '*.q_proj'",
        )
    return chosen


def _refuse_adapters(model: nn.Module) -> None:
    # peft's layers of any method wrap a base layer
    there = next((name for name, part in model.named_modules() if _is_adapted(part) or _wraps_base(part)), None)
    if there is not None:
        raise QatkitError(
            f"layer '{there}' already has an adapter",
            key="model",
            advice="merge the adapter first (qatkit.lora.merge, or merge_and_unload of peft)",
        )


def _refuse_recomputed(name: str, layer: nn.Module) -> None:
    """Raise if the weight is not a parameter: weight and spectral norm, pruning and parametrizations compute it."""
    if "weight" not in layer._parameters:
        raise QatkitError(
            f"layer '{name}' recomputes its weight on each call (weight_norm, spectral_norm, torch.nn.utils.prune "
            "or another parametrization), so a merged update would be lost",
            key="targets",
            advice="remove the parametrization first, or use patterns that do not match the layer",
        )


def base_layers(model: nn.Module) -> list[str]:
    """Return the layers that bitsandbytes may quantize: linear, except output layers, heads and shared weights."""
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
    """Freeze a model and attach adapters to some of its layers, in place, without changing outputs.

    Adapters are peft's, unless a layer is fake-quantized or has a sparsity mask. In that case, all adapters are
    `AdaptedWeight`, whose update is part of the weight. Scales of fake quantizers stay trainable. So does the head of a
    transformers classifier, because its weights are random unless the model was trained for classification.

    Args:
        model: Any module.
        names: Layer names from `target_layers`.
        adapter: The configuration of the updates.
        held: Layers whose pruned weights stay zero.

    Raises:
        QatkitError: a layer already has an adapter or recomputes its weight on each call, or the adapter or a layer's
            type does not support an update inside the weight.
    """
    _refuse_adapters(model)
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if kind_of(layer) is None:
            _refuse_recomputed(name, layer)
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

        # under another root, because with FSDP2 peft takes a LightningModule, which has a device mesh, for a model of
        # transformers, and reads its config
        root = nn.ModuleDict({"root": model})
        inject_adapter_in_model(peft_config([f"root.{name}" for name in names], adapter), root)
        cast_adapter_dtype(root, NAME)  # as in get_peft_model: 16-bit factors lose updates of usual learning rates
    for parameter in (*trained, *(p for name in heads for p in model.get_submodule(name).parameters())):
        parameter.requires_grad_(True)


def check_inside(layers: dict[str, nn.Module], adapter: Adapter, held: bool) -> None:
    """Raise an error if the updates cannot be part of the weights.

    Raises:
        QatkitError: an option or a layer does not support this.
    """
    why = "whose zeros are kept" if held else "that is quantized in the same stage"
    for key in ("dora", "dropout"):
        if value := getattr(adapter, key):
            raise QatkitError(
                f"{value} is not supported for a layer {why}, because the low-rank update becomes part of the weight",
                key=key,
                advice=f"remove {key}",
            )
    for name, layer in layers.items():
        if kind_of(layer) is not None:
            raise QatkitError(
                f"layer '{name}' is frozen in {kind_of(layer)} bits, which is not supported for a layer {why}",
                key="bits",
                advice="set bits: null, or merge the adapters in an earlier stage",
            )
        if type(layer) not in SWAPS:
            raise QatkitError(
                f"layer '{name}', a {type(layer).__name__} {why}, cannot have an adapter (only nn.Linear can)",
                key="targets",
                advice="use patterns that do not match the layer",
            )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with adapters (from peft or qatkit) by name."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


def merge(model: nn.Module, device: torch.device | None = None) -> list[str]:
    """Merge all updates into their weights and remove the adapters, in place.

    A 4-bit or 8-bit base is first dequantized to plain layers with exactly the same values, because requantizing to so
    few bits would lose the update. Fake-quantized layers stay fake-quantized.

    Args:
        model: A model with adapters.
        device: Device on which to merge updates inside the weight. The default is the weight's device.

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
    """Dequantize 4-bit and 8-bit layers to plain layers with the same values, in place; adapters are kept."""
    for name, layer in adapted_layers(model).items():
        base = None if isinstance(layer, AdaptedWeight) else layer.get_base_layer()  # type: ignore[operator]
        if base is not None and kind_of(base) is not None:
            set_child(model, name, _over_plain_base(layer, base))
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None:
            set_child(model, name, dequantized(module))


def _over_plain_base(layer: nn.Module, base: nn.Module) -> nn.Module:
    """Return the same adapter over the dequantized base."""
    holder = nn.ModuleDict({"layer": dequantized(base)})
    attach(holder, ["layer"], adapter_of(layer))
    with torch.no_grad():
        for key, value in factors_of(holder["layer"]).items():
            value.data = factors_of(layer)[key].detach()
    return holder["layer"]


def factors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors of an adapter by their names in peft's files."""
    if isinstance(layer, AdaptedWeight):
        return {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    factors = {f"{part}.weight": getattr(layer, part)[NAME].weight for part in ("lora_A", "lora_B")}
    if NAME in layer.lora_magnitude_vector:  # type: ignore[operator]
        factors["lora_magnitude_vector"] = layer.lora_magnitude_vector[NAME].weight  # type: ignore[index, union-attr]
    return factors


def adapter_of(layer: Any) -> Adapter:
    if isinstance(layer, AdaptedWeight):
        return Adapter(layer.lora_A.shape[0], layer.lora_alpha)
    return Adapter(layer.r[NAME], layer.lora_alpha[NAME], 0.0, NAME in layer.lora_magnitude_vector)


def peft_config(names: list[str], adapter: Adapter) -> Any:
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
    # transformers' Conv1D (GPT-2) is a linear layer with a transposed weight
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "QATConv1D")


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, AdaptedWeight) or (hasattr(module, "lora_A") and _wraps_base(module))


def _wraps_base(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer")


def _heads(model: nn.Module) -> set[nn.Module]:
    heads = set()
    for module in model.modules():
        if callable(getter := getattr(module, "get_output_embeddings", None)):
            try:
                heads.add(getter())
            except (NotImplementedError, AttributeError):  # not every part of a model has one
                continue
    return heads - {None}


def _by_last_part(name: str) -> str:
    """The pattern of all layers whose names end like this one's."""
    parent, _, last = name.rpartition(".")
    return f"*.{last}" if parent else last


def _takes(pattern: str, name: str, head: bool) -> bool:
    # `*` or `model.*` does not name a particular layer
    return fnmatchcase(name, pattern) and not (head and set(pattern.rpartition(".")[2]) <= {"*", "?"})
