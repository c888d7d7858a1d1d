"""Causal language models: pretrained ones, and small ones with random weights in the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from torch import nn

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
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Args:
        vocab_size: Tokens of the tokenizer.
        hidden: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads; each is ``hidden / heads`` wide.
        kv_heads: Heads of keys and values, each shared by ``heads / kv_heads`` query heads.
        intermediate: Width of the feed-forward layers.
        context: Longest sequence, in tokens.
        tie_embeddings: One matrix for the input embedding and the output layer.

    Raises:
        QatkitError: the numbers of heads do not divide what they share.

    Example:
        >>> import torch
        >>> model = llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1)
        >>> model(torch.zeros(1, 5, dtype=torch.long)).logits.shape
        torch.Size([1, 5, 300])
    """
    if hidden % heads or (hidden // heads) % 2:
        raise QatkitError(f"heads: {heads} heads of a hidden size of {hidden} are not of one even width; write another")
    if heads % kv_heads:
        raise QatkitError(f"kv_heads: {heads} query heads cannot share {kv_heads} equally; write a divisor of {heads}")
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


def causal_lm(
    name_or_path: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A pretrained language model of transformers, from a folder or from the hub.

    On torch's meta device, where recipes are validated, only its config is read.

    Args:
        name_or_path: A folder that `save_pretrained` wrote (config.json and weights), or the name of a model on the
            hub, such as "Qwen/Qwen3-0.6B"; what is a folder here is taken as that.
        dtype: Of the weights. float32 is for training all of them; bf16-mixed computes faster on them.
        attn_implementation: How transformers computes attention.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.

    Raises:
        QatkitError: the folder holds no model, or the hub does not have it or cannot be reached.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     llama(vocab_size=300, hidden=32, layers=1, heads=2, kv_heads=1).save_pretrained(folder)
        ...     type(causal_lm(folder)).__name__
        'LlamaForCausalLM'
    """
    local = Path(name_or_path).expanduser()
    # transformers takes what is no folder for a name on the hub, and then says that it found nothing there
    if local.is_dir():
        _check_folder(local)
    elif local.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise QatkitError(f"name_or_path: '{name_or_path}' is no folder; write one that holds config.json and weights")
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(local) if local.is_dir() else name_or_path
    offline = not local.is_dir() and _is_only_cached(name_or_path)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    try:
        if torch.get_default_device().type == "meta":
            config = AutoConfig.from_pretrained(source, local_files_only=offline)
            model = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForCausalLM.from_pretrained(source, local_files_only=offline, **options)
    except (OSError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise QatkitError(
            f"name_or_path: '{name_or_path}' cannot be loaded as a causal language model ({said[:200]}); write a "
            "folder or a name that holds one"
        ) from error
    model.config.use_cache = False  # training and evaluation see whole sequences
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found: nn.Module = model
    return found


def _is_only_cached(name: str) -> bool:
    """Whether the hub cannot be asked about a model whose files are here; transformers would try for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # those of the hub's HTTP library share no class with the hub's own
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        said = " ".join(str(error).split())
        raise QatkitError(
            f"name_or_path: '{name}' is no folder, and asking the hub for it failed ({said[:200]}); write a folder "
            "that holds the model, or the name of one on the hub while there is a network"
        ) from error
    return False


def _check_folder(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QatkitError(
            f"name_or_path: {folder} has no config.json that can be read ({error}); write a folder that "
            "save_pretrained wrote"
        ) from error
    if "model_type" not in config:
        raise QatkitError(f"name_or_path: {folder / 'config.json'} names no model_type; it is not of transformers")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        raise QatkitError(f"name_or_path: {folder} holds no .safetensors file; copy the model's weights there")
