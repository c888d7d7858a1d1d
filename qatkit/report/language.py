"""Evaluate a language model on held-out text: perplexity, and agreement with the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError
from qatkit.tasks import Task, call, perplexity, task_of

Text = tuple[Tensor, Tensor]
"""Token IDs and labels, ``[tokens]`` each."""


@dataclass(frozen=True)
class LanguageScore:
    """Metrics of a language model on held-out text; every token is predicted once."""

    context: int
    """Maximum number of tokens in a window, including the predicted token."""
    stride: int
    """Tokens between the starts of two windows; after the first window, a token is predicted from at least
    ``context - stride`` tokens."""
    tokens: int
    loss: float
    """Per token, in nats."""
    perplexity: float
    agreement: float
    """Fraction of tokens with the same top-1 prediction as the dense model."""
    kl: float
    """KL(dense || model) per token, in nats."""


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield overlapping windows over a text: start, end, and the first token that no earlier window predicted.

    Example:
        >>> list(windows(10, context=6, stride=2))
        [(0, 6, 1), (2, 8, 6), (4, 10, 8)]
    """
    new = 1  # the first token has no predecessor
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        if end > new:
            yield begin, end, new
        new = max(new, end)
        if end == length:
            return


@torch.no_grad()
def score(
    model: Callable[..., Any],
    dense: Callable[..., Any] | None,
    texts: Sequence[Text],
    context: int,
    stride: int,
    batch_size: int = 8,
) -> LanguageScore:
    """Measure a causal language model on texts with a sliding window.

    Args:
        model: The model in eval mode; called with ``input_ids``.
        dense: The reference model; None if `model` is the dense model itself.
        texts: Token IDs and labels; labels of -100 are ignored.
        context: Tokens per window.
        stride: Tokens between the starts of two windows, at most `context`; usually half of it.
        batch_size: Windows per batch.

    Raises:
        QatkitError: context or stride is out of range, or all labels are -100.
    """
    if context < 2 or not 1 <= stride <= context:
        raise QatkitError(
            f"{stride} with context {context} is out of range",
            key="evaluate.stride",
            advice="set context to at least 2, and stride to a value from 1 to context",
        )
    loss = kl = 0.0
    count = same = 0
    for tokens, labels in _batches(texts, context, stride, batch_size):
        logits = call(model, {"input_ids": tokens})[:, :-1]
        counted = labels[:, 1:] != IGNORED
        wanted = labels[:, 1:][counted]
        ours = F.log_softmax(logits[counted].float(), dim=-1)
        count += len(wanted)
        loss += float(F.nll_loss(ours, wanted, reduction="sum"))
        if dense is None:
            same += len(wanted)
            continue
        theirs = F.log_softmax(call(dense, {"input_ids": tokens})[:, :-1][counted].float(), dim=-1)
        kl += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    if count == 0:
        raise QatkitError(
            "all labels in the test split are -100, so no metric can be measured",
            key="evaluate",
            advice="use data with labels other than -100",
        )
    mean = loss / count
    return LanguageScore(context, stride, count, mean, perplexity(mean), same / count, kl / count)


def _batches(texts: Sequence[Text], context: int, stride: int, size: int) -> Iterator[Text]:
    """Yield batches of windows of equal length; labels of tokens that were already predicted are ignored."""
    waiting: dict[int, list[Text]] = {}
    for tokens, labels in texts:
        for begin, end, new in windows(len(tokens), context, stride):
            own = labels[begin:end].clone()
            own[: new - begin] = IGNORED
            group = waiting.setdefault(end - begin, [])
            group.append((tokens[begin:end], own))
            if len(group) == size:
                yield _stacked(waiting.pop(end - begin))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: Sequence[Text]) -> Text:
    tokens, labels = zip(*group, strict=True)
    return torch.stack(tokens), torch.stack(labels)


def texts_of(batches: Iterable[Any], declared: Task | None = None) -> list[Text]:
    """Return the texts of a test split, or a single text if the batches are windows of one token stream.

    The batches are such windows if the labels equal the tokens and there is no attention mask and no position IDs.
    Otherwise, every row is a text, without its padding. A packed row, in which positions restart, is split into one
    text per document.

    Raises:
        QatkitError: the task is not next-token prediction.
    """
    rows: list[Text] = []
    stream = True
    for batch in batches:
        if not (task := task_of(batch, declared)).next_token:
            raise next_token_only(task)
        stream = stream and set(batch) <= {"input_ids", "labels"} and torch.equal(batch["input_ids"], batch["labels"])
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        for index, (tokens, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[index].bool()
            begins = [] if positions is None else (positions[index][kept] == 0).nonzero().flatten().tolist()
            parts = (part[kept].cpu().tensor_split(begins) for part in (tokens, labels))
            rows += [text for text in zip(*parts, strict=True) if len(text[0])]
    if stream and rows:
        return [(torch.cat([tokens for tokens, _ in rows]), torch.cat([labels for _, labels in rows]))]
    return rows


def next_token_only(task: Task) -> QatkitError:
    """Return the error for a task other than next-token prediction."""
    return QatkitError(
        f"evaluation is supported only for next-token prediction, but the task is {task.name} ({task.description})",
        key="evaluate",
        advice="remove evaluate; the report always contains the test metrics",
    )


def check_harness(tasks: Sequence[str], allow: Sequence[str]) -> None:
    """Check that lm-evaluation-harness is installed, and that the recipe may run its tasks.

    A task's YAML file may call Python code in its folder (``!function``), so files need permission. Names refer to
    tasks in the installed package.

    Args:
        tasks: The tasks of the recipe.
        allow: Additional packages whose code the recipe may use.

    Raises:
        QatkitError: lm-evaluation-harness is not installed, or a task is a file and "lm_eval" is not allowed.
    """
    files = [task for task in tasks if Path(task).suffix or Path(task).name != task or Path(task).exists()]
    if files and "lm_eval" not in allow:
        raise QatkitError(
            f"'{files[0]}' is a file, and a task file may run Python code",
            key="evaluate.tasks",
            advice="if you trust the file, pass --allow lm_eval",
        )
    if find_spec("lm_eval") is None:
        raise QatkitError("lm_eval is not installed", key="evaluate.tasks", advice="run: pip install 'qatkit[lm-eval]'")


def harness(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Run lm-evaluation-harness tasks on a transformers model.

    Args:
        model: The model in eval mode.
        tokenizer: A transformers tokenizer.
        tasks: Names from ``lm_eval ls tasks``, or YAML files with custom tasks.
        limit: Samples per task (default: all).
        batch_size: Samples per batch.

    Returns:
        The first metric of every task, by ``"task metric"``.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, bootstrap_iters=0)["results"]
    return {f"{task} {name}": value for task, row in results.items() for name, value in _first_metric(row)}


def _first_metric(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    # keys are "metric,filter"; others are the alias and standard errors
    numbers = [(key.partition(",")[0], value) for key, value in row.items() if "," in key and "stderr" not in key]
    return [(name, float(value)) for name, value in numbers[:1]]
