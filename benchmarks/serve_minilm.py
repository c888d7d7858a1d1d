"""Parts of `serve.py`: the sentence encoder all-MiniLM-L6-v2, on passages of 64 tokens."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from minilm import FULL, QUICK, Size, Student, dense_model, tokenizer
from qatkit.callbacks import HiddenMatch, KnowledgeDistillation
from sentences import sentences
from serve_models import Family
from serve_network import Network, call, parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from qatkit.tasks.pairs import pooled

TOKENS = 64
PASSAGE = 4
"""Sentences of a passage; most fill all tokens."""


class Embedding(nn.Module):
    """The encoder with its pooling: one normalized vector per passage."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(pooled(hidden, attention_mask, "mean"), dim=-1)


def passages(split: str, count: int, size: Size, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and mask ``[count, 64]`` of passages, which are sentences of a split in random order."""
    found = sentences(size.pretrained)[split]
    draw = random.Random(seed)
    texts = [" ".join(draw.sample(found, PASSAGE)) for _ in range(count)]
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    batch = tokenizer(size)(texts, return_tensors="pt", **options)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def batches(count: int, rows: int, size: Size, seed: int) -> list[dict[str, Tensor]]:
    """Batches of passages for training."""
    return list(parts(passages("train", count * rows, size, seed), rows))  # type: ignore[arg-type]


def minilm(family: Family, quick: bool) -> Network:
    """The encoder, compared with itself in floating point; a tiny one with random weights in the quick mode."""
    size = QUICK if quick else FULL
    held_out = passages("held-out", size.held_out, size)
    dense = Embedding(dense_model(size)).eval()
    with torch.no_grad():
        exact = torch.cat([call(dense, part) for part in parts(held_out)])

    def tune(quantization: Callback) -> nn.Module:
        seed_everything(0)
        student = copy.deepcopy(dense.encoder)
        steps = 3 if quick else family.steps
        distill = KnowledgeDistillation(
            dense.encoder, alpha=1.0, student="model", loss="cosine", pooling="mean",
            hidden=HiddenMatch({"encoder.layer.*": "encoder.layer.*"}, 1.0),
        )  # fmt: skip
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[quantization, distill],
        )  # fmt: skip
        loader = DataLoader(batches(steps, family.batch, size, 0), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(Student(student, family.tuning_lr, steps), loader)
        return Embedding(student).eval()

    example = {name: tensor[:2] for name, tensor in held_out.items()}
    return Network(dense, example, held_out, batches(8, 16, size, 1), tune, exact)
