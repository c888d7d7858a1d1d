"""Equivalent transformations: move a scale from an input's producer to its consumers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.quantization.layers import QATLayer, QATTransposedLinear
from qatkit.quantization.ptq.hessian import InputStatistics


@dataclass(frozen=True)
class Edge:
    """The producer of an input and all its consumers, as names inside a block."""

    producer: str
    consumers: tuple[str, ...]
    offset: float = 0.0
    """Constant that the norm adds to its weight before multiplying."""
    relu: str = ""
    """Name of the activation function in between, which must be a ReLU."""
    if_true: str = ""
    """Attribute of the block that must be true; otherwise, the norm is in a different place."""


@dataclass(frozen=True)
class Fold:
    """The producer of an input and all its consumers, as modules."""

    producer: nn.Module
    consumers: tuple[nn.Module, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class SharedInput:
    """One input that a method may rescale, with its statistics and the layers that read it."""

    readers: Sequence[QATLayer]
    """The quantized layers that read the input."""
    matrices: Sequence[Tensor]
    """The weights of all layers that read the input, each ``[out, in]``."""
    statistics: InputStatistics


_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
_V_O = Edge("self_attn.v_proj", ("self_attn.o_proj",))
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_UP_DOWN = Edge("mlp.up_proj", ("mlp.down_proj",))
_LLAMA = (Edge("input_layernorm", _QKV), _V_O, Edge("post_attention_layernorm", _GATED), _UP_DOWN)
_GEMMA2 = (Edge("input_layernorm", _QKV, 1.0), _V_O, Edge("pre_feedforward_layernorm", _GATED, 1.0), _UP_DOWN)

BLOCKS: dict[str, tuple[Edge, ...]] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": (
        Edge("input_layernorm", _QKV, 1.0), _V_O, Edge("post_attention_layernorm", _GATED, 1.0), _UP_DOWN,
    ),
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "GPT2Block": (Edge("ln_1", ("attn.c_attn",)), Edge("ln_2", ("mlp.c_fc",))),
    "OPTDecoderLayer": (
        Edge("self_attn_layer_norm", _QKV, if_true="do_layer_norm_before"),
        Edge("self_attn.v_proj", ("self_attn.out_proj",)),
        Edge("final_layer_norm", ("fc1",), if_true="do_layer_norm_before"),
        Edge("fc1", ("fc2",), relu="activation_fn"),
    ),
    # its norms follow the residual sum, and the next residual sum reads their output as well
    "BertLayer": (
        Edge("attention.self.value", ("attention.output.dense",)),
        Edge("intermediate.dense", ("output.dense",), relu="intermediate.intermediate_act_fn"),
    ),
}  # fmt: skip
"""The edges inside transformers' blocks, by class name."""


def find_folds(root: nn.Module, uses: Counter[int]) -> list[Fold]:
    """Find the edges of known blocks and of Linear-ReLU-Linear in `nn.Sequential`.

    Args:
        root: A block or a whole model; the module itself is also searched.
        uses: Number of uses of every parameter in the model, by ``id``; shared weights cannot be rescaled.

    Raises:
        QatkitError: A module that should be a linear layer has a different type, such as an adapter.
    """
    folds: list[Fold] = []
    for module in root.modules():
        kind = type(module).__name__
        for edge in BLOCKS.get(kind, ()):
            folds += _table_fold(module, edge, kind)
        if isinstance(module, nn.Sequential):
            folds += _sequential_folds(module)
    return [fold for fold in folds if all(uses[id(part.weight)] == 1 for part in (fold.producer, *fold.consumers))]


def parameter_uses(model: nn.Module) -> Counter[int]:
    """Count the uses of every parameter; a module with two names is counted twice."""
    return Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )


def _table_fold(block: nn.Module, edge: Edge, kind: str) -> Iterator[Fold]:
    if edge.if_true and not getattr(block, edge.if_true):
        return
    if edge.relu and not isinstance(block.get_submodule(edge.relu), nn.ReLU):
        return
    producer, *consumers = (block.get_submodule(name) for name in (edge.producer, *edge.consumers))
    for name, module in zip(edge.consumers, consumers, strict=True):
        if not _is_linear(module):
            raise QatkitError(
                f"layer '{name}' of {kind} is a {type(module).__name__}, not a linear layer, so its input cannot be "
                "scaled",
                advice="merge adapters first, or use gptq",
            )
    if _is_linear(producer):  # with grouped-query attention one output of v_proj feeds several inputs of o_proj
        if _matrix(producer).shape[0] != _matrix(consumers[0]).shape[1]:
            return
    elif not isinstance(getattr(producer, "weight", None), nn.Parameter):
        return  # a norm without a weight
    yield Fold(producer, tuple(consumers), edge.offset)


def _sequential_folds(layers: nn.Sequential) -> Iterator[Fold]:
    producer: nn.Module | None = None
    for layer in layers:
        if isinstance(layer, nn.Linear):
            if producer is not None:
                yield Fold(producer, (layer,))
            producer = layer
        elif not isinstance(layer, nn.ReLU | nn.Dropout | nn.Identity):
            producer = None


def fold_tensors(fold: Fold) -> list[Tensor]:
    """Return the parameters that `apply_fold` changes."""
    bias = getattr(fold.producer, "bias", None)
    weights = [part.weight for part in (fold.producer, *fold.consumers) if isinstance(part.weight, Tensor)]
    return weights if bias is None else [*weights, bias]


@torch.no_grad()
def apply_fold(fold: Fold, scales: Tensor) -> None:
    """Divide a producer by `scales` and multiply its consumers' columns, in place.

    Args:
        fold: Producer and consumers.
        scales: Positive scales, float32 ``[in]``.
    """
    producer = fold.producer
    if _is_linear(producer):
        matrix = _matrix(producer)
        matrix.copy_(matrix.float() / scales[:, None])
    else:
        assert isinstance(producer.weight, Tensor)
        producer.weight.copy_((producer.weight.float() + fold.offset) / scales - fold.offset)
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.copy_(bias.float() / scales)
    for consumer in fold.consumers:
        matrix = _matrix(consumer)
        matrix.copy_(matrix.float() * scales)


def fold_matrices(fold: Fold) -> list[Tensor]:
    """Return the weights of the consumers, each ``[out, in]``."""
    return [_matrix(consumer).detach() for consumer in fold.consumers]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QATTransposedLinear) or type(module).__name__ == "Conv1D"


def _matrix(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as ``[out, in]``, transposed for transformers' Conv1D."""
    assert isinstance(module.weight, Tensor)
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()
