"""Training batches of generated text, for on-policy and sequence-level distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError

KEYS = {"input_ids", "attention_mask", "labels"}
"""Allowed entries of a batch whose prompts are continued; any other entry would describe the original sequences."""


def cut_prompts(batch: Mapping[str, Any], length: int | None) -> tuple[Tensor, Tensor]:
    """Cut prompts from a batch's sequences, with the left padding that transformers' `generate` expects.

    Args:
        batch: "input_ids" ``[rows, tokens]``, and an "attention_mask" of the same shape if sequences are padded, on
            either side.
        length: Prompt length in tokens; shorter sequences have shorter prompts. None cuts at the first labeled token,
            where the answer starts in instruction data.

    Returns:
        Tokens ``[rows, longest]`` and the attention mask.

    Raises:
        QatkitError: the batch contains no text, or a sequence has no prompt.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1],
        ...     [1, 0, 0]])}
        >>> cut_prompts(batch, 2)[0].tolist()
        [[5, 6], [0, 8]]
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        content = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise QatkitError(
            f"a batch contains {content}, but no 'input_ids' of shape [rows, tokens]",
            key="prompt",
            advice="use text data, because only text can be generated",
        )
    if extra := sorted(set(batch) - KEYS):
        raise QatkitError(
            f"a batch contains {extra}, which generated text does not have",
            key="prompt",
            advice=f"use data whose batches contain only {sorted(KEYS)}",
        )
    present = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens, dtype=torch.bool)
    ranks = present.cumsum(dim=1)  # 1 for the first token of a text, whatever precedes it
    if length is None:
        if "labels" not in batch:
            raise QatkitError(
                "a batch has no 'labels' to mark the end of its prompts",
                key="prompt",
                advice="set a prompt length, such as prompt: 32",
            )
        answered = (batch["labels"] != IGNORED) & present
        lengths = (present & (answered.cumsum(dim=1) == 0)).sum(dim=1)
    else:
        lengths = ranks[:, -1].clamp(max=length)
    if bool((lengths == 0).any()):
        raise QatkitError(
            "a sample has no tokens before its first label" if length is None else "a sample in a batch is empty",
            key="prompt",
            advice="set a prompt length, such as prompt: 32"
            if length is None
            else "remove empty samples from the data",
        )
    longest = int(lengths.max())
    prompts, mask = tokens.new_zeros(len(tokens), longest), tokens.new_zeros(len(tokens), longest)
    chosen = present & (ranks <= lengths[:, None])
    row, _ = chosen.nonzero(as_tuple=True)
    place = (ranks + (longest - lengths)[:, None] - 1)[chosen]
    prompts[row, place] = tokens[chosen]
    mask[row, place] = 1
    return prompts, mask


def generator_in(model: nn.Module, key: str) -> nn.Module:
    """Find the transformers model that can generate text: `model` or one of its submodules.

    Args:
        model: The student or the teacher.
        key: The option that requires generation, for the error.

    Raises:
        QatkitError: no submodule can generate text.
    """
    for part in model.modules():
        if callable(getattr(part, "generate", None)) and hasattr(part, "generation_config"):
            return part
    raise QatkitError(
        f"{type(model).__name__} cannot generate text; only a transformers causal language model has generate()",
        key=key,
        advice=f"remove {key}",
    )


def check_length(model: nn.Module, key: str, tokens: int) -> None:
    """Raise an error if sequences are longer than the model's maximum number of positions.

    Args:
        model: The student or the teacher.
        key: The option that sets the length, for the error.
        tokens: Length of the longest sequence.

    Raises:
        QatkitError: the sequences are too long.
    """
    longest = getattr(getattr(generator_in(model, key), "config", None), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise QatkitError(
            f"prompt and new tokens add up to {tokens} tokens, but the model has only {longest} positions",
            key=key,
            advice="reduce prompt or new_tokens",
        )


def generated_batch(
    model: nn.Module,
    prompts: Tensor,
    attention_mask: Tensor,
    new_tokens: int,
    temperature: float,
    eos: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """Continue prompts with a transformers model, and return the sequences as a training batch.

    Each token is sampled from the model's full distribution, in eval mode and with a separate random generator. The
    model's mode, its generation settings and torch's generator are restored afterwards.

    Args:
        model: A model with transformers' `generate`.
        prompts: Left-padded tokens ``[rows, longest]``.
        attention_mask: 1 where there is a token.
        new_tokens: Maximum number of generated tokens.
        temperature: Divides the logits before sampling; 0 always picks the most probable token.
        eos: End-of-sequence tokens.
        seed: Random seed for sampling.

    Returns:
        "input_ids", "attention_mask" and "labels" ``[rows, tokens]``, right-padded. Labels are -100 except at generated
        tokens up to and including the first end-of-text token.
    """
    generator: Any = model
    settings = generator.generation_config
    modes = [(module, module.training) for module in model.modules()]
    filler = eos[0] if eos else 0
    there = next(model.parameters()).device  # a teacher may have its own device
    devices = [there] if there.type == "cuda" else []
    try:
        model.eval()
        # replaces the model's own settings: a chat model's top_k or repetition penalty would change the distribution
        drawn = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        generator.generation_config = type(settings)(
            max_new_tokens=new_tokens, use_cache=True, eos_token_id=list(eos) or None, pad_token_id=filler, **drawn
        )
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            texts: Tensor = generator.generate(
                input_ids=prompts.to(there), attention_mask=attention_mask.to(there), synced_gpus=_is_sharded(model)
            ).to(prompts.device)
    finally:
        generator.generation_config = settings
        for module, mode in modes:
            module.training = mode
    width = prompts.shape[1]
    ends = torch.isin(texts[:, width:], torch.tensor(list(eos), dtype=texts.dtype, device=texts.device))
    written = (ends.cumsum(dim=1) - ends.long()) == 0  # the first end-of-text token belongs to the text
    mask = torch.cat([attention_mask.bool(), written], dim=1)
    answer = torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), written], dim=1)
    # move padding to the right, so that positions count from each text's first token by default
    order = (torch.arange(texts.shape[1], device=texts.device) + (width - attention_mask.sum(dim=1, keepdim=True))) % (
        texts.shape[1]
    )
    texts, mask, answer = (part.gather(1, order) for part in (texts, mask, answer))
    return {
        "input_ids": texts.masked_fill(~mask, filler),
        "attention_mask": mask.long(),
        "labels": texts.masked_fill(~answer, IGNORED),
    }


def _is_sharded(model: nn.Module) -> bool:
    """Whether weights are sharded: each step gathers them, so every process must run the same number of steps."""
    from torch.distributed.tensor import DTensor  # seconds, which `qatkit validate` does not need

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
