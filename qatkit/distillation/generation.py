"""Texts that a model writes itself, as batches to train on: on-policy and sequence-level distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qatkit.distillation.losses import IGNORED
from qatkit.errors import QatkitError

KEYS = {"input_ids", "attention_mask", "labels"}
"""What a batch may hold whose texts are continued: anything else would belong to the text that was there before."""


def cut_prompts(batch: Mapping[str, Any], length: int | None) -> tuple[Tensor, Tensor]:
    """The beginnings of a batch's texts, padded on the left as `generate` of transformers wants them.

    Args:
        batch: "input_ids" ``[rows, tokens]``; "attention_mask" of that shape where texts are padded, on either side.
        length: Tokens of a prompt, fewer where a text has fewer; None takes those before the first that has a label,
            as data of instructions and answers mark them.

    Returns:
        Tokens ``[rows, longest]`` and their attention mask.

    Raises:
        QatkitError: the batch is no batch of texts, or a text has no prompt.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1],
        ...     [1, 0, 0]])}
        >>> cut_prompts(batch, 2)[0].tolist()
        [[5, 6], [0, 8]]
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise QatkitError(f"prompt: a batch has {held} and no 'input_ids' of texts; only texts can be continued")
    if extra := sorted(set(batch) - KEYS):
        raise QatkitError(f"prompt: a batch holds {extra}, which a generated text has not; give only {sorted(KEYS)}")
    present = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens, dtype=torch.bool)
    ranks = present.cumsum(dim=1)  # 1 for the first token of a text, whatever stands before it
    if length is None:
        if "labels" not in batch:
            raise QatkitError("prompt: a batch has no 'labels' that say where its prompts end; write prompt: 32")
        answered = (batch["labels"] != IGNORED) & present
        lengths = (present & (answered.cumsum(dim=1) == 0)).sum(dim=1)
    else:
        lengths = ranks[:, -1].clamp(max=length)
    if bool((lengths == 0).any()):
        raise QatkitError(
            "prompt: a text has no token before its first label; write how many tokens are the prompt, prompt: 32"
            if length is None
            else "prompt: a text of a batch has no token at all; leave it out of the data"
        )
    longest = int(lengths.max())
    prompts, mask = tokens.new_zeros(len(tokens), longest), tokens.new_zeros(len(tokens), longest)
    chosen = present & (ranks <= lengths[:, None])
    row, _ = chosen.nonzero(as_tuple=True)
    place = (ranks + (longest - lengths)[:, None] - 1)[chosen]
    prompts[row, place] = tokens[chosen]
    mask[row, place] = 1
    return prompts, mask


def writer_in(model: nn.Module, key: str) -> nn.Module:
    """The model of transformers that can write texts: this one or one inside of it.

    Args:
        model: The student or the teacher.
        key: What asks for it, for the error.

    Raises:
        QatkitError: there is none.
    """
    for part in model.modules():
        if callable(getattr(part, "generate", None)) and hasattr(part, "generation_config"):
            return part
    raise QatkitError(
        f"{key}: {type(model).__name__} cannot write texts; only a causal language model of transformers, which has "
        f"generate(), can: leave {key} out"
    )


def check_length(model: nn.Module, key: str, tokens: int) -> None:
    """Refuse texts that are longer than the model knows positions for.

    Args:
        model: The student or the teacher.
        key: What asks for it, for the error.
        tokens: Of the longest text.

    Raises:
        QatkitError: names both lengths.
    """
    longest = getattr(getattr(writer_in(model, key), "config", None), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise QatkitError(
            f"{key}: prompt and new_tokens make texts of {tokens} tokens, and the model knows {longest} positions; "
            "write smaller numbers"
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
    """Let a model of transformers continue prompts, and give the texts as a batch to train on.

    Every token is drawn from the model's whole distribution, in eval mode and with its own random numbers; the model's
    mode, its generation settings and torch's generator are afterwards as they were.

    Args:
        model: What has transformers' `generate`.
        prompts: Tokens ``[rows, longest]``, padded on the left.
        attention_mask: 1 where there is a token.
        new_tokens: Tokens to write at most.
        temperature: Divides the logits before a token is drawn; 0 takes the most probable one.
        eos: Tokens that end a text.
        seed: Decides what is drawn.

    Returns:
        "input_ids", "attention_mask" and "labels" ``[rows, tokens]``, padded on the right. Labels are -100 but for what
        the model wrote up to its first end of text, and that end itself.
    """
    generator: Any = model
    settings = generator.generation_config
    modes = [(module, module.training) for module in model.modules()]
    filler = eos[0] if eos else 0
    there = next(model.parameters()).device  # a teacher may have a device of its own
    devices = [there] if there.type == "cuda" else []
    try:
        model.eval()
        # not those of the model: a chat model's top_k or repetition penalty would draw from another distribution
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
    written = (ends.cumsum(dim=1) - ends.long()) == 0  # the first end belongs to the text, nothing after it does
    mask = torch.cat([attention_mask.bool(), written], dim=1)
    answer = torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), written], dim=1)
    # padded on the right instead: positions then count from each text's first token without being told
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
    """Whether processes must take the same number of steps, as each step gathers the others' shares of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
