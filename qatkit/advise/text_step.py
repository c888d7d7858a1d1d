"""The loss of one training step on text, used to predict its memory use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.advise.step_memory import Step
from qatkit.distillation.chunked import Head, TopKTargets, linear_kd_terms
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.distillation.output_layer import output_layer
from qatkit.lora.heads import classification_heads
from qatkit.recipe import DistillConfig
from qatkit.tasks import Task, answers, call, mean_loss, row_loss, task_of
from qatkit.tasks.pairs import pooled


def text_step(context: int, batch_size: int, distill: DistillConfig | None, task: Task | None) -> Step:
    """Compute the loss of one text batch in the same way as `CompressionModule` and `KnowledgeDistillation`.

    Args:
        context: Tokens per sequence.
        batch_size: Sequences per batch.
        distill: Distillation settings; a step without a teacher model reads cached teacher outputs. None trains on
            labels only.
        task: The task that the data declares; None infers it from the model.
    """

    def step(model: nn.Module, teacher: nn.Module | None) -> Tensor:
        batch = batch_for(model, batch_size, context, task)
        tokens = batch["input_ids"]
        if distill is None:
            return mean_loss(model, batch, task)
        layer = output_layer(model)
        theirs = output_layer(teacher) if teacher is not None else layer
        if layer is not None and theirs is not None and has_fused_loss(distill):
            return _fused(model, layer, teacher, theirs, tokens, distill)
        logits = call(model, batch)
        with torch.no_grad():
            teacher_logits = call(teacher.eval(), batch) if teacher is not None else torch.zeros_like(logits)
        outputs = [logits, teacher_logits]
        if task is not None and task.embeds:
            outputs = [pooled(hidden, batch["attention_mask"], batch["pooling"]) for hidden in outputs]
        divergence: Tensor = DIVERGENCES[distill.loss].loss(
            *outputs, temperature=distill.temperature, beta=distill.beta
        )
        loss = distill.alpha * divergence
        if task is None or task.next_token:
            hard = torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
        else:
            hard = row_loss(*answers(logits, batch, task), task_of(batch, task))[0]
        return loss + (1 - distill.alpha) * hard

    return step


def batch_for(model: nn.Module, batch_size: int, context: int, task: Task | None) -> dict[str, Any]:
    """Create a batch of full-length sequences with labels.

    Args:
        model: Determines the labels if no task is declared: one class per sequence for a classifier, text pairs for a
            model without an output head, and otherwise the tokens themselves.
        batch_size: Number of sequences, or of text pairs.
        context: Tokens per sequence.
        task: The task that the data declares.
    """
    tokens = torch.zeros(batch_size, context, dtype=torch.long)
    one = torch.zeros(batch_size, dtype=torch.long)
    texts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    name = task.name if task is not None else _inferred(model)
    if name == "pairs":
        both = torch.cat([tokens, tokens])
        mask = torch.ones_like(both)
        return {"input_ids": both, "attention_mask": mask, "labels": one, "task": "pairs", "pooling": "mean"}
    if name == "text_classification":
        return texts | {"labels": one}
    if name == "question_answering":
        return texts | {"start_positions": one, "end_positions": one}
    if name == "seq2seq":
        return texts | {"decoder_input_ids": tokens, "labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def _inferred(model: nn.Module) -> str:
    if classification_heads(model):
        return "text_classification"
    head: Any = getattr(model, "get_output_embeddings", None)
    return "pairs" if head is not None and head() is None else "causal"


def _fused(
    model: nn.Module,
    layer: nn.Linear,
    teacher: nn.Module | None,
    theirs: nn.Linear,
    tokens: Tensor,
    distill: DistillConfig,
) -> Tensor:
    """Both losses from the inputs of the output layers, as in `qatkit.callbacks.fused`."""
    batch = {"input_ids": tokens}
    layer.forward = theirs.forward = lambda input: input  # type: ignore[method-assign]  # on copies
    hidden = call(model, batch)
    rows = tokens.numel()
    if teacher is None:
        best = distill.cache.top_k if distill.cache is not None else 1
        answer: Head | TopKTargets = TopKTargets(
            torch.zeros(rows, best, dtype=torch.int32), torch.zeros(rows, best), torch.zeros(rows)
        )
    else:
        with torch.no_grad():
            answer = Head(call(teacher.eval(), batch).flatten(0, 1), theirs.weight.detach(), theirs.bias)
    student = Head(hidden.flatten(0, 1), layer.weight, layer.bias)
    counted = torch.ones(rows, dtype=torch.bool)
    how = (distill.temperature, distill.alpha, distill.loss, distill.beta)
    return linear_kd_terms(student, answer, tokens.flatten(), counted, *how).loss


def has_fused_loss(distill: DistillConfig) -> bool:
    """Whether the fused loss, which never materializes full logits, supports this divergence."""
    divergence = DIVERGENCES[distill.loss]
    return bool(divergence.rows if distill.cache is None else divergence.top_k_rows)
