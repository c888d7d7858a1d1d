"""Generate text samples with a language model while it trains."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from qatkit.callbacks.generation import eos_tokens, tokenizer_of
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from qatkit.common.files import naming, write_atomically
from qatkit.distillation.generation import check_length, generated_batch, generator_in
from qatkit.errors import QatkitError


class TextSamples(Callback):
    """Complete prompts with the model, and record the completions in a file, and in W&B or TensorBoard if enabled.

    Decoding is greedy, in eval mode and with isolated random state, so training results are bit-identical with and
    without this callback. A resumed run removes samples written after its checkpoint.

    Args:
        every: Number of optimizer steps between samples.
        prompts: Prompts to complete.
        path: A JSON Lines file; each line has "step", "prompt" and "text".
        max_new_tokens: Maximum number of generated tokens.
        tokenizer: A transformers tokenizer. The default is the ``tokenizer`` attribute of the data module.

    Raises:
        QatkitError: there is no tokenizer, the model cannot generate text, or a sample would exceed the model's maximum
            sequence length.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from qatkit.callbacks import TextSamples
        >>> trainer = Trainer(callbacks=[TextSamples(every=100, prompts=["def main"], path=Path("samples.jsonl"))])
    """

    def __init__(
        self, every: int, prompts: Sequence[str], path: Path, max_new_tokens: int = 32, tokenizer: Any = None
    ) -> None:
        if every < 1:
            raise QatkitError(f"{every} is out of range", key="every", advice="use a positive integer")
        if isinstance(prompts, str):
            raise QatkitError(f"'{prompts}' is not a list", key="prompts", advice=f"use ['{prompts}']")
        self.every = every
        self.prompts = list(prompts)
        self.path = path
        self.max_new_tokens = max_new_tokens
        self.tokenizer = tokenizer
        self._tokens: list[list[int]] = []
        self._last = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokenizer = self.tokenizer or tokenizer_of(trainer)
        if self.tokenizer is None:
            raise QatkitError(
                "the data has no tokenizer to encode the prompts",
                key="prompts",
                advice="pass tokenizer=, or remove the samples",
            )
        self._tokens = [self.tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        check_length(pl_module, "prompts", max(map(len, self._tokens)) + self.max_new_tokens)
        self._last = trainer.global_step
        if trainer.is_global_zero and self.path.exists():
            kept = [row for row in _rows(self.path) if row["step"] <= trainer.global_step]
            write_atomically(self.path, "".join(map(_line, kept)))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self._last:  # another batch of an accumulated step
            return
        self._last = step
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        if not (trainer.is_global_zero or sharded):  # sharded weights are gathered on every process
            return
        texts = self._texts(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        rows: list[dict[str, Any]] = [
            {"step": step, "prompt": p, "text": text} for p, text in zip(self.prompts, texts, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)
            elif isinstance(logger, TensorBoardLogger):
                for index, row in enumerate(rows):
                    shown = f"**{row['prompt']}**\n```\n{row['text']}\n```"
                    logger.experiment.add_text(f"samples/{index}", shown, step)

    def _texts(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return the model's completion of each prompt."""
        model: Any = generator_in(pl_module, "prompts")
        longest = max(map(len, self._tokens))
        # padded on the left, as generate() requires
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in self._tokens])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in self._tokens])
        compiled = any(module._compiled_call_impl is not None for module in pl_module.modules())
        # it would be recompiled for every length
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        ends = eos_tokens(model, self.tokenizer)
        with eager, trainer.precision_plugin.forward_context():
            batch = generated_batch(model, tokens, mask, self.max_new_tokens, 0.0, ends, seed=0)
        return [self._decoded(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]

    def _decoded(self, ids: Tensor, labels: Tensor) -> str:
        text: str = self.tokenizer.decode(ids[labels >= 0], skip_special_tokens=True)
        return text


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may hold other line ends
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a killed process may leave an incomplete last line
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise QatkitError(f"{path} contains a line that is not a sample ({line[:60]!r})", advice="delete the line")
        rows.append(row)
    return rows
