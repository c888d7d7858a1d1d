"""The model card of an exported file: README.md next to it, with metadata that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qatkit.common.files import write_atomically
from qatkit.common.units import format_bytes
from qatkit.export.usage import USAGES
from qatkit.report.sentences import parity
from qatkit.run.exports import Exported, exports_of
from qatkit.run.folder import Run
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import TASKS

CARD = "README.md"
PIPELINE_TAGS = {
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "text_classification": "text-classification",
    "causal": "text-generation",
    "masked": "fill-mask",
    "pairs": "sentence-similarity",
}
"""The ``pipeline_tag`` of tasks that have exactly one on the Hugging Face hub."""


def write_cards(run: Run, exports: Sequence[Exported], checks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the model card of every verified export, as ``README.md`` in its folder.

    Args:
        run: The run.
        exports: The exports.
        checks: The fields of the `Verification` of each, and of the exports to which they are compared, by name.
    """
    for exported in exports:
        same = (each for each in exports_of(run) if each.format is exported.format)
        first = next(each for each in same if each.name in checks)
        write_atomically(exported.folder / CARD, card(run, exported, checks[exported.name], first, checks[first.name]))


def card(
    run: Run, exported: Exported, check: Mapping[str, Any], first: Exported, first_check: Mapping[str, Any]
) -> str:
    """Return the text of a model card.

    Args:
        run: The run.
        exported: The export.
        check: The fields of its `Verification`.
        first: The first stage of the comparison in the same format, to which the export is compared.
        first_check: The fields of the first stage's verification.
    """
    from huggingface_hub import ModelCardData

    row, architecture = exported.format, _architecture(exported.folder)
    usage = USAGES.get(row.name)  # none for a format that is not part of qatkit
    data = ModelCardData(
        library_name=None if usage is None else usage.library_of(architecture),
        base_model=_base_model(run),
        pipeline_tag=PIPELINE_TAGS.get(check["task"]),
        tags=["qatkit", row.name],
    )
    said = parity(dict(check))
    recipe = (run.out / "recipe.yaml").read_text(encoding="utf-8").strip()
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.recipe.name}: {exported.stage}",
        f"Stage `{exported.stage}` of the recipe below, exported as `{row.name}` ({row.description}) by "
        f"qatkit {version('qatkit')}.",
        *([] if usage is None else ["## Use", f"```{usage.language}\n{usage.lines(architecture)}\n```", usage.note]),
        "## Results",
        _results(exported, check, first, first_check),
        "## Verification",
        "\n".join([said["headline"], *said["sentences"]]),
        "## Recipe",
        f"```yaml\n{recipe}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(exported: Exported, check: Mapping[str, Any], first: Exported, first_check: Mapping[str, Any]) -> str:
    """The table of the task's metric and the size."""
    metric = METRICS[TASKS[check["task"]].metric]
    columns = [(first, first_check), (exported, check)] if exported != first else [(exported, check)]

    def shown(value: float | None) -> str:
        return "-" if value is None else metric.show(value)

    rows = [
        ["", *(f"`{each.stage}`" for each, _ in columns)],
        ["---"] * (1 + len(columns)),
        [f"test {metric.name} in PyTorch", *(shown(fields["trained_metric"]) for _, fields in columns)],
        [f"test {metric.name} in {check['runtime']}", *(shown(fields["runtime_metric"]) for _, fields in columns)],
        ["size of the weights", *(format_bytes(each.bytes) for each, _ in columns)],
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _architecture(folder: Path) -> str:
    """The class in the transformers config of a folder; empty if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    return str(found[0])


def _base_model(run: Run) -> str | None:
    """The hub's name of the pretrained model; None for a local folder or a model with random weights."""
    name = run.recipe.model.args.get("name_or_path")
    return name if isinstance(name, str) and not Path(name).expanduser().exists() else None
