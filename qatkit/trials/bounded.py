"""Find the smallest model whose metric loses at most a given part, with training inside the search.

The search is a sweep whose configurations follow from each other, so its folder is that of a sweep, equal stages are
computed once, and a search that was interrupted resumes:

1. The stages before the last one are trained.
2. The loss increase of every layer group and format is measured without training, on training data.
3. An integer program gives the least predicted increase for each of several sizes: the ladder.
4. Short trainings bisect the ladder by the metric on the validation split; full trainings decide.
5. The result is compared with the dense model on the test split, which no decision has used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.pipeline.export import held_out_data
from qatkit.pipeline.runner import run_stages, stage_prints
from qatkit.pipeline.verify import read_verification
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.quantization.mixed.sensitivity import measure_sensitivity
from qatkit.recipe import Recipe
from qatkit.recipe.loading import recipe_to_yaml
from qatkit.run.exports import Exported, exports_of, formats_by_key
from qatkit.run.folder import Run
from qatkit.run.sharing import share_stages, shared_name
from qatkit.schemes import Scheme
from qatkit.tasks.metrics import METRICS
from qatkit.tasks.table import TASKS, declared_task
from qatkit.trials.execution import run_trials
from qatkit.trials.ladder import Rung, Step, climb, ladder
from qatkit.trials.promise import Promise, compare
from qatkit.trials.sensitivity import training_loss
from qatkit.trials.sweep import Trial, load_configurations, open_sweep

RUNGS = 8
"""Number of sizes on the ladder."""
SHORT = 0.25
"""Part of the steps of a short training."""
SENSITIVITY_BATCHES = 16


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    kept: bool
    """Whether the metric on the test split lost at most the limit, and the file passed verification."""
    verified: bool
    """Whether the file passed verification."""
    limit: float
    promise: Promise
    file: str
    """The path of the exported file."""
    bytes: int
    dense_bytes: int
    steps: list[Step]
    ladder: list[Rung]


class Search:
    """One search in its folder, whose lock the caller must hold.

    Args:
        folder: The folder.
        recipe: Name or path of the recipe.
        fixed: Overrides of all trainings.
        base: The recipe with these overrides.
        candidates: Formats by name.
        limit: The largest loss of the metric; see `Metric.lost`.
        allow: Packages whose code the recipe may use.
        say: Called with a line about every step.

    Raises:
        QatkitError: no stage trains a quantized model, or it does not follow a stage without quantization.
    """

    def __init__(
        self, folder: Path, recipe: str, fixed: Sequence[str], base: Recipe, candidates: Mapping[str, Scheme],
        limit: float, allow: Sequence[str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.recipe, self.fixed, self.base, self.allow = folder, recipe, fixed, base, allow
        self.candidates, self.limit, self.say = candidates, limit, say
        self.stage = searched_stage(base)
        check_runtime(base)
        self.steps = base.stages[self.stage].max_steps
        self._trials: dict[str, Trial] = {}

    def run(self, budget: float) -> Found:
        """Search, and compare the result with the dense model on the test split.

        Args:
            budget: Cost of the trainings, in full trainings of the quantized stage.

        Raises:
            QatkitError: a training fails, or the data has no validation split.
        """
        sensitivity = self._measured(self._before())
        rungs = ladder(sensitivity, RUNGS)
        write_atomically(self.folder / "sensitivity.json", json.dumps(sensitivity.to_plain(), indent=1))
        low, high = rungs[0].bytes, rungs[-1].bytes
        self.say(f"{len(rungs)} sizes of the quantized weights, from {low:,} to {high:,} bytes")

        def lost(index: int, full: bool) -> float:
            trial = self._trained(rungs[index].layers, full)
            value = self._lost(trial)
            kind = "full" if full else "short"
            verdict = "within" if value <= self.limit else "beyond"
            self.say(
                f"{rungs[index].bytes:,} bytes, {kind} training: the validation metric loses {value:.2%}, {verdict} "
                f"{self.limit:.2%}"
            )
            return value

        steps = climb(len(rungs), self.limit, lost, SHORT, budget)
        last = self._trained(rungs[steps[-1].rung].layers, full=True)
        exported = _exported(last.run, self.stage)
        run, data = last.run, held_out_data(last.run)
        dense = self._dense_stage(run)
        promise = compare(run, dense, exported, data.test_dataloader(), declared_task(data))
        passed = bool(read_verification(run, exported)["passed"])
        found = Found(
            kept=passed and promise.lost <= self.limit + 1e-12, verified=passed, limit=self.limit, promise=promise,
            file=str(exported.path), bytes=exported.bytes, dense_bytes=_exported(run, dense).bytes, steps=steps,
            ladder=rungs,
        )  # fmt: skip
        write_atomically(self.folder / "search.json", json.dumps(asdict(found), indent=1))
        return found

    def _before(self) -> Run:
        """The run of the stages before the last one, which all trials share."""
        open_sweep(self.folder, self.base, [], [], self.allow)
        out = self.folder / "runs" / "before"
        prints = stage_prints(Run(self.base, out, self.allow))
        share_stages(out, {name: shared_name(name, known.fingerprint) for name, known in prints.items()})
        write_atomically(out / "recipe.yaml", recipe_to_yaml(self.base))
        run = Run(self.base, out, self.allow)
        if (before := self.base.parent_of(self.stage)) is not None:
            run_stages(run, until=before)
        return run

    def _trained(self, layers: Mapping[str, Any], full: bool) -> Trial:
        """The finished trial with these formats; it is trained if it does not exist."""
        stage = f"stages.{self.stage}"
        steps = self.steps if full else max(1, round(SHORT * self.steps))
        values = {f"{stage}.max_steps": steps, f"{stage}.quantize.layers": dict(layers)}
        key = json.dumps(values, sort_keys=True)
        if key not in self._trials:
            recipes = load_configurations(self.recipe, self.fixed, [values], self.allow)
            trials = open_sweep(self.folder, self.base, [values], recipes, self.allow)
            trial = next(trial for trial in trials if dict(trial.values) == values)
            if not trial.is_finished:
                options = [part for name in self.allow for part in ("--allow", name)]
                ends = run_trials([trial], 1, options, lambda _: None, lambda _, end: None)
                if not trial.is_finished:
                    raise QatkitError(
                        ends[trial.number].message, origin=str(trial.run.out / "output.txt"),
                        advice="run the same command again when it is mended",
                    )  # fmt: skip
            self._trials[key] = trial
        return self._trials[key]

    def _dense_stage(self, run: Run) -> str:
        return run.uncompressed[-1]

    def _measured(self, run: Run) -> Sensitivity:
        """The loss increases of the model before the quantized stage."""
        config = self.base.stages[self.stage]
        assert config.quantize is not None
        before = self.base.parent_of(self.stage)
        model = run.load_model(before, quantizers=False)
        fold_batchnorm(model)
        loss = training_loss(run, config.batch_size, SENSITIVITY_BATCHES)
        return measure_sensitivity(model, self.candidates, loss, config.quantize.include, config.quantize.exclude)

    def _lost(self, trial: Trial) -> float:
        """How much worse the validation metric is than that of the dense stage."""
        run = trial.run
        metric = METRICS[TASKS.row(read_verification(run, _exported(run, self.stage))["task"]).metric]
        values = []
        for stage in (self._dense_stage(run), self.stage):
            value = run.record(stage).metrics.get(f"val/{metric.name}")
            if value is None:
                raise QatkitError(
                    "a search decides by the validation split, but the data has none", key="data",
                    advice="add a split, such as data.args.val_fraction: 0.1",
                )  # fmt: skip
            values.append(value)
        return metric.lost(*values)


def searched_stage(recipe: Recipe) -> str:
    """Return the stage whose formats are searched: the last one, which must train a quantized model.

    Raises:
        QatkitError: it does not.
    """
    name = list(recipe.stages)[-1]
    stage = recipe.stages[name]
    if stage.quantize is None or not stage.max_steps:
        raise QatkitError(
            "a search changes the formats of the last stage, which must train a quantized model",
            key=f"stages.{name}", advice="add max_steps and a quantize block to the last stage",
        )  # fmt: skip
    if stage.quantize.layers:
        raise QatkitError(
            "a search sets the format of every layer", key=f"stages.{name}.quantize.layers",
            advice="remove layers, and use include, exclude and --candidates",
        )  # fmt: skip
    if not Run(recipe, Path()).uncompressed:
        raise QatkitError(
            "there is no stage without compression, to whose metric the loss is relative", key="stages",
            advice="add a stage such as dense: {max_steps: 0} at the beginning",
        )  # fmt: skip
    return name


def check_runtime(recipe: Recipe) -> None:
    """Raise an error unless the recipe exports to a format whose runtime can be measured in this environment.

    Raises:
        QatkitError: there is no format, or its runtime needs an environment of its own.
    """
    rows = formats_by_key(recipe)
    if not rows:
        raise QatkitError("a search measures exported files", key="export", advice="add export: {format: onnx}")
    key, row = next(iter(rows.items()))
    if row.environment:
        raise QatkitError(
            f"a search measures files in their runtime, but {row.runtime} does not run in this environment", key=key,
            advice="put a format first whose runtime does, such as onnx or compressed_tensors",
        )  # fmt: skip


def _exported(run: Run, stage: str) -> Exported:
    return next(each for each in exports_of(run) if each.stage == stage)
