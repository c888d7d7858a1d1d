"""`nn.MultiheadAttention` with fake-quantized projections.

The three input projections are slices of one parameter, ``in_proj_weight``, or three parameters if keys and values have
different widths. Each is a part with its own scales. The output projection is a separate layer, ``out_proj``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitError
from qatkit.quantization.layers import rounded_bias
from qatkit.quantization.parts import QATParts

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class QATMultiheadAttention(QATParts, nn.MultiheadAttention):
    """An `nn.MultiheadAttention` with fake-quantized projections, even in eval mode.

    torch's own `forward` reads the weights directly, and calls a fused kernel in eval mode; both would bypass the fake
    quantizers. The attention itself (products of queries, keys and values) is not quantized.
    """

    kind = "multi-head attention"
    in_proj_bias: Tensor | None  # type: ignore[assignment]  # torch declares it as always present

    def part_names(self) -> tuple[str, ...]:
        return PROJECTIONS

    def parameter(self, part: str) -> Tensor | None:
        return self.in_proj_weight if self._qkv_same_embed_dim else getattr(self, f"{part}_weight")

    def matrix(self, part: str) -> Tensor:
        weight = QATMultiheadAttention.parameter(self, part)
        assert weight is not None
        return weight.chunk(3)[PROJECTIONS.index(part)] if self._qkv_same_embed_dim else weight

    def shipped(self) -> dict[str, Tensor]:
        weights, biases = {}, []
        for part in PROJECTIONS:
            weights[f"{part}_weight"], scale = self.with_scale(part)
            inputs = self.input_quantizer(part)
            static = inputs is not None and not inputs.dynamic and inputs.ready
            biases.append(self._bias(part, scale, inputs.qparams(torch.empty(0))[0] if inputs and static else None))
        shipped = {"in_proj_weight": torch.cat(list(weights.values()))} if self._qkv_same_embed_dim else weights
        if self.in_proj_bias is not None:
            shipped["in_proj_bias"] = torch.cat([bias for bias in biases if bias is not None])
        return shipped

    def part_bias(self, part: str) -> Tensor | None:
        return None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[PROJECTIONS.index(part)]

    def _bias(self, part: str, weight_scale: Tensor | None, input_scale: Tensor | None) -> Tensor | None:
        bias = self.part_bias(part)
        return rounded_bias(bias, self.weight_quantizer(part), self.input_quantizer(part), weight_scale, input_scale)

    def _project(self, part: str, x: Tensor) -> Tensor:
        weight, weight_scale = self.with_scale(part)
        inputs = self.input_quantizer(part)
        x, input_scale = (x, None) if inputs is None else inputs.with_scale(x)
        return F.linear(x, weight, self._bias(part, weight_scale, input_scale))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise QatkitError(
                "is_causal=True is only a hint about attn_mask, which is missing", advice="pass attn_mask"
            )
        batched = query.dim() == 3
        q, k, v = (self._project(*pair) for pair in zip(PROJECTIONS, (query, key, value), strict=True))
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = self._mask(q, attn_mask, key_padding_mask)
        # the hint lets the kernel skip the mask, where the mask is nothing but causal
        hinted = is_causal and key_padding_mask is None and not need_weights
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        added = (self.bias_k is not None) + self.add_zero_attn
        if mask is not None and added:
            mask = F.pad(mask, (0, added))  # added keys are never masked
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * math.sqrt(1.0 / self.head_dim) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, None if hinted else mask, dropout, hinted)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Add both masks as floats, ``[batch or 1, heads or 1, queries or 1, keys]``.

        Args:
            q: ``[batch, queries, width]``.
            attn_mask: ``[queries, keys]`` or ``[batch * heads, queries, keys]``, boolean (True: masked) or float.
            key_padding_mask: ``[batch, keys]`` or, without a batch, ``[keys]``, boolean or float.
        """
        mask = None
        if attn_mask is not None:
            mask = _as_float(attn_mask, q.dtype)
            mask = mask[None, None] if mask.dim() == 2 else mask.view(q.shape[0], self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _as_float(key_padding_mask, q.dtype).view(q.shape[0], 1, 1, -1)
            mask = padding if mask is None else mask + padding
        return mask


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
