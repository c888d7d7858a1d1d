"""The results of a sweep: every exported file once, with latencies that were measured in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qatkit.common.records import write_signed
from qatkit.pipeline.baselines import example_of
from qatkit.pipeline.evaluation import evaluate_run
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.pipeline.verify import read_verification
from qatkit.recipe import Recipe
from qatkit.report.bench import File, compare_files
from qatkit.report.content import Measurements, stage_row
from qatkit.run.compatibility import with_tokenizer
from qatkit.run.exports import Exported, exports_of
from qatkit.run.folder import Run
from qatkit.tasks.metrics import METRICS, Metric
from qatkit.tasks.table import TASKS
from qatkit.trials.grid import value_text
from qatkit.trials.sweep import Trial

SCHEMA = 1
"""Version of ``results.json``."""


@dataclass(frozen=True)
class Result:
    """An exported file of a sweep. Trials share the files of shared stages."""

    trials: list[int]
    """The numbers of the trials with this file."""
    values: dict[str, Any]
    """The values of the swept keys on which the file depends: those that are equal in all of its trials."""
    last: bool
    """Whether it is the result of a trial, and not of one of its earlier stages."""
    row: dict[str, Any] = field(repr=False)
    """Its row in a report, without histograms."""
    data: str
    """The data on which its metric was measured, as JSON."""

    @property
    def metric(self) -> Metric:
        """The main metric of its task."""
        return METRICS[TASKS.row(self.row["verification"]["task"]).metric]


def measured_results(trials: Sequence[Trial]) -> list[Result]:
    """Measure the latency of all exported files in alternation in one process, and return all results.

    Args:
        trials: Finished trials.

    Raises:
        QatkitError: an exported file has changed since its verification, or its runtime cannot load it.
    """
    owners: dict[Path, list[tuple[Trial, Exported]]] = {}
    for trial in trials:
        for exported in exports_of(trial.run):
            owners.setdefault(exported.folder, []).append((trial, exported))
    files: dict[str, File] = {}
    rows: dict[Path, dict[str, Any]] = {}
    for folder, ((trial, exported), *_) in owners.items():
        run, data = trial.run, held_out_data(trial.run)
        verification = {exported.name: read_verification(run, exported)}
        language = evaluate_run(run, data) if run.recipe.evaluate else {}
        rows[folder] = stage_row(run, exported, Measurements(verification, language=language))
        if exported.format.benchmark:
            files[str(folder)] = File(exported.path, example_of(first_batch(data)), exported.format.name)
    latencies = compare_files(files) if files else {}
    return [
        Result(
            trials=[trial.number for trial, _ in owned],
            values=_values(owned),
            last=any(exported.stage == trial.run.rows[-1] for trial, exported in owned),
            row={**rows[folder], "latency": latencies.get(str(folder), [])},
            data=_data(owned[0][0].run),
        )
        for folder, owned in owners.items()
    ]


def objectives(trial: Trial) -> dict[str, tuple[float, bool]]:
    """Return the metric and the size of a finished trial, each with whether higher is better."""
    exported = next(each for each in exports_of(trial.run) if each.stage == trial.run.rows[-1])
    metric = METRICS[TASKS.row(read_verification(trial.run, exported)["task"]).metric]
    value = trial.run.record(exported.stage).metrics[f"test/{metric.name}"]
    return {metric.name: (value, metric.higher_is_better), "bytes": (float(exported.bytes), False)}


def write_results(path: Path, results: Sequence[Result], failures: Mapping[int, str]) -> None:
    """Write ``results.json``.

    Args:
        path: The file.
        results: All results.
        failures: Why trials failed, by number.
    """
    content = {
        "results": [asdict(result) for result in results],
        "failures": {str(number): reason for number, reason in failures.items()},
    }
    write_signed(path, content, SCHEMA, lambda plain: json.dumps(plain, indent=1))


def _data(run: Run) -> str:
    """The data on which a run is measured; the tokenizer of a pretrained model belongs to it."""
    data = with_tokenizer(run.recipe.data, run.recipe.model, run.allow)
    return json.dumps(asdict(data), default=str, sort_keys=True)


def _values(owned: Sequence[tuple[Trial, Exported]]) -> dict[str, Any]:
    """The values on which a file depends."""
    (first, exported), *_ = owned
    before = _stages_before(first.run.recipe, exported.stage)

    def matters(key: str, value: Any) -> bool:
        head, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if head == "stages" and name in first.run.recipe.stages and name not in before:
            return False
        return all(key in trial.values and value_text(trial.values[key]) == value_text(value) for trial, _ in owned)

    return {key: value for key, value in first.values.items() if matters(key, value)}


def _stages_before(recipe: Recipe, stage: str) -> set[str]:
    """A stage, and all stages from which its model or its teacher comes."""
    found, waiting = set[str](), [stage]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            teacher = recipe.teacher_of(name) if recipe.stages[name].distill else None
            waiting += [each for each in (recipe.parent_of(name), teacher) if each is not None]
    return found
