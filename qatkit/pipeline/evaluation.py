"""The ``evaluate`` block of a recipe: language metrics of finished stages, stored next to each stage's export."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypedDict

from lightning.pytorch import LightningDataModule

from qatkit.common.records import read_signed, write_signed
from qatkit.errors import QatkitError
from qatkit.report.language import LanguageScore, check_harness, harness, score, texts_of
from qatkit.run.folder import Run
from qatkit.tasks import declared_task

SCHEMA = 1
"""Version of ``evaluation.json``."""


@dataclass(frozen=True)
class _Score(LanguageScore):
    tasks: dict[str, float]


class _Kept(TypedDict):
    """The content of ``evaluation.json``."""

    of: list[Any]
    """The inputs of the score: the fingerprints of the stage and of the reference, and the ``evaluate`` block."""
    score: _Score


def evaluate_run(run: Run, data: LightningDataModule) -> dict[str, dict[str, Any]]:
    """Score every row of the comparison as configured in the ``evaluate`` block; return {} if there is no block.

    Existing scores for the same stages and the same block are reused.

    Args:
        run: The run; its stages are finished.
        data: The run's data, set up for testing.

    Returns:
        For each stage, the fields of `LanguageScore`, and ``tasks`` with the metrics of lm-evaluation-harness.

    Raises:
        QatkitError: the data is not text, a requirement of the tasks is missing, or a stored score is corrupt.
    """
    config = run.recipe.evaluate
    if config is None:
        return {}
    scores: dict[str, dict[str, Any]] = {}
    first = run.rows[0]
    reference = None if run.recipe.stages[first].compresses else first
    texts: Any = None
    if config.tasks:
        check_harness(config.tasks, run.allow)
    for stage in run.rows:
        path = run.export_folder(stage) / "evaluation.json"
        of = [run.record(stage).fingerprint, run.record(reference).fingerprint if reference else "", asdict(config)]
        kept = read_signed(path, _Kept, SCHEMA, f"delete {path} to rerun the evaluation")
        if kept is not None and kept["of"] == of:
            scores[stage] = kept["score"]
            continue
        if texts is None:
            texts = texts_of(data.test_dataloader(), declared_task(data))
        context = config.context or min(max(map(_length, texts)), max(_lengths(data)))
        model = run.load_model(stage).eval()
        dense = None if stage == reference else run.load_model(reference).eval()
        # texts shorter than the samples of the data fit into one window each, whatever the stride
        stride = min(config.stride or max(context // 2, 1), context)
        measured = asdict(score(model, dense, texts, context, stride))
        measured["tasks"] = harness(model, _tokenizer(data), config.tasks, config.limit) if config.tasks else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_signed(path, {"of": of, "score": measured}, SCHEMA, partial(json.dumps, indent=1))
        scores[stage] = measured
    return scores


def _length(text: Any) -> int:
    return len(text[0])


def _lengths(data: LightningDataModule) -> list[int]:
    """The numbers of tokens of the samples of the first batch."""
    return [len(row) for row in next(iter(data.test_dataloader()))["input_ids"]]


def _tokenizer(data: LightningDataModule) -> Any:
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        raise QatkitError("the data has no tokenizer", key="evaluate.tasks", advice="remove tasks")
    return tokenizer
