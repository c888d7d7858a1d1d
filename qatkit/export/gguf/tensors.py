"""The content of the GGUF file of a model: tensors and metadata."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.gguf.architectures import INSTEAD, architecture_of
from qatkit.export.gguf.bits import Array
from qatkit.export.gguf.packing import BLOCK_TYPES, BlockType, block_type_of
from qatkit.export.gguf.rope import rope_factors
from qatkit.quantization.arithmetic import dequantize, quantize
from qatkit.quantization.layers import QATLayer
from qatkit.quantization.modules import FakeQuantize, full_tensor
from qatkit.quantization.state import quantizer_prefixes

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Types of unquantized tensors, smallest first."""
_FLOAT32 = ("position_embd.weight", "token_types.weight")
"""Matrices that llama.cpp adds to other tensors, which it supports only in float32."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    key: str
    """Name of the parameter or buffer, or its first name if it is tied. Empty for a tensor computed from the config."""
    name: str
    """The name in the file."""
    tensor: Tensor
    """The parameter or buffer itself."""
    layer: QATLayer | None = None
    """The layer that quantizes it."""
    heads: int = 0
    """The number of heads whose rows are interleaved; 0 if the rows keep their order."""
    offset: float = 0.0
    """The number that the file adds to the values."""
    transposed: bool = False
    """Whether the parameter is ``[in, out]`` but the file stores ``[out, in]``."""

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.key or self.name

    @property
    def quantizer(self) -> FakeQuantize | None:
        """The fake quantizer of the tensor, or None."""
        return None if self.layer is None else self.layer.weight_fake_quant

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        shape = tuple(self.tensor.shape)
        return shape[::-1] if self.transposed else shape

    @cached_property
    def type(self) -> str:
        """The name of the tensor's type in GGUF.

        Unquantized matrices have the smallest floating-point type that holds their values, and all other tensors are
        float32, as llama.cpp requires.
        """
        if self.quantizer is not None:
            return self._block_type.name if self.quantizer.spec.element.scaled else "F16"
        value = self.values()
        if value.dim() < 2 or self.name in _FLOAT32:
            return "F32"
        exact = (name for name, dtype in _DTYPES.items() if torch.equal(value.to(dtype).float(), value))
        return next(exact, "F32")  # NaN equals nothing

    @property
    def _block_type(self) -> BlockType:
        assert self.quantizer is not None
        block = block_type_of(self.quantizer.spec)
        assert block is not None, "`check` refuses all other specs"
        return block

    def _coded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes, scales and zero points (or minima) of a quantized tensor."""
        assert self.layer is not None
        assert self.quantizer is not None
        matrix = full_tensor(self.layer.matrix)
        scale, zero_point = self.quantizer.whole_qparams(matrix)
        return quantize(matrix, scale, zero_point, self.quantizer.spec), scale, zero_point

    def _arranged(self, rows: Tensor) -> Tensor:
        """The rows of a tensor, or of its bytes, in the order of the file."""
        if not self.heads:
            return rows
        return rows.reshape(self.heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def values(self) -> Tensor:
        """Return the values of the tensor in the order of the file, in float32."""
        if self.quantizer is None:
            values = full_tensor(self.tensor).float().cpu()
            return self._arranged(values.t() if self.transposed else values) + self.offset
        return self._arranged(dequantize(*self._coded(), self.quantizer.spec).cpu())

    def scales(self) -> Tensor | None:
        """Return the numbers of a quantized tensor's blocks except codes, in the order of the file.

        They are the scales ``[out, blocks]``, or ``[out, blocks, 4]`` in NVFP4; of super-blocks, the outer scales, the
        scales and the minima ``[out, blocks, numbers]``.
        """
        if self.quantizer is None or not self.quantizer.spec.element.scaled:
            return None
        numbers = self._coded()[1:]
        if not self.quantizer.spec.super_blocks:
            scales, groups = numbers[0].cpu(), self._block_type.groups
            return self._arranged(scales if groups == 1 else scales.view(len(scales), -1, groups))
        outer = self._outer()
        own = [part.cpu().view(*outer.shape[:2], -1) for part in numbers[: outer.shape[2]]]
        return self._arranged(torch.cat([outer, *own], dim=-1))

    def _outer(self) -> Tensor:
        """The outer scale; empty if there is none."""
        assert self.quantizer is not None
        outer = self.quantizer.outer_scale
        return torch.empty(0) if outer is None else outer.cpu()

    def data(self) -> Array:
        """Return the bytes that the file stores, ``[..., bytes of a row]``."""
        if self.quantizer is not None and self.quantizer.spec.element.scaled:
            packed = self._block_type.pack(*(part.cpu().numpy() for part in (*self._coded(), self._outer())))
            return np.ascontiguousarray(self._arranged(torch.from_numpy(packed)).numpy())
        values = self.values().to(_DTYPES[self.type]).contiguous()
        return values.view(torch.uint8).numpy()


def stored_tensors(model: nn.Module) -> list[Stored]:
    """Return the tensors of a model's file: every parameter and saved buffer, tied ones once.

    Raises:
        QatkitError: a tensor has no name in this architecture.
    """
    import gguf

    row, config = architecture_of(model), cast(Any, model.config)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.gguf)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    own, first = quantizer_prefixes(model), dict[int, tuple[str, Tensor]]()
    for key, value in model.state_dict(keep_vars=True).items():
        if not key.startswith(own):
            first.setdefault(id(value), (key, value))
    stored = []
    for key, tensor in first.values():
        layer = model.get_submodule(key.rpartition(".")[0])
        weight = layer if isinstance(layer, QATLayer) and key.endswith(".weight") else None
        if row.omitted and key.startswith(row.omitted):
            if weight is not None:
                raise QatkitError(f"GGUF files of '{row.name}' do not store '{key}'", advice="exclude the layer")
            continue
        if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
            raise QatkitError(f"'{key}' has no name in GGUF's architecture '{row.gguf}'", advice=INSTEAD)
        if name in _FLOAT32 and weight is not None:
            raise QatkitError(
                f"layer '{key.rpartition('.')[0]}': llama.cpp reads position and token type embeddings only in float32",
                advice="exclude the layer",
            )
        offset = row.norm_offset if key.endswith("norm.weight") else 0.0
        transposed = is_transposed(layer) and key.endswith(".weight")
        stored.append(Stored(key, name, tensor, weight, row.heads(key, config), offset, transposed))
    if (factors := rope_factors(config)) is not None:
        stored.append(Stored("", "rope_freqs.weight", factors))
    return stored


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is the `Conv1D` of transformers, plain or quantized: a linear layer with a transposed weight."""
    return any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def file_metadata(model: nn.Module, tensors: list[Stored]) -> dict[str, Any]:
    """Return the metadata of a model's file by key, except its name and its tokenizer."""
    import gguf

    row, config = architecture_of(model), cast(Any, model.config)
    quantized = [tensor for tensor in tensors if tensor.quantizer is not None]
    sizes = Counter[str]()
    for tensor in quantized or tensors:
        sizes[tensor.type] += tensor.tensor.numel()
    most = sizes.most_common(1)[0][0]
    plain = {"F32": "ALL_F32"}.get(most, f"MOSTLY_{most}")
    kind = gguf.LlamaFileType[BLOCK_TYPES[most].file_type if most in BLOCK_TYPES else plain]
    return {
        "general.architecture": row.gguf,
        "general.file_type": int(kind),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **row.metadata(config),
    }
