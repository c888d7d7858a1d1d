"""Small language models with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def llama(
    vocab_size: int = 2048,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 6,
    kv_heads: int = 3,
    intermediate: int = 512,
    context: int = 128,
    tie_embeddings: bool = True,
) -> LlamaForCausalLM:
    """Build a Llama-style decoder with RMSNorm, rotary position embeddings, grouped-query attention and SwiGLU.

    Args:
        vocab_size: Vocabulary size.
        hidden: Width of the residual stream.
        layers: Number of decoder layers.
        heads: Number of query heads, each with width ``hidden / heads``.
        kv_heads: Number of key and value heads, each shared by ``heads / kv_heads`` query heads.
        intermediate: Width of the feed-forward layers.
        context: Maximum sequence length in tokens.
        tie_embeddings: Use one matrix for the input embedding and the output layer.

    Raises:
        QatkitError: `heads` does not divide `hidden` into even widths, or `kv_heads` does not divide `heads`.

    Example:
        >>> import torch
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1)
        >>> model(torch.zeros(1, 5, dtype=torch.long)).logits.shape
        torch.Size([1, 5, 300])
    """
    if hidden % heads or (hidden // heads) % 2:
        raise QatkitError(
            f"{heads} does not divide hidden={hidden} into heads of an even width",
            key="heads",
            advice="use a divisor of hidden / 2",
        )
    if heads % kv_heads:
        raise QatkitError(
            f"{kv_heads} does not divide heads={heads}", key="kv_heads", advice=f"use a divisor of {heads}"
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=context,
        tie_word_embeddings=tie_embeddings,
        use_cache=False,  # training and evaluation see whole sequences
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)
