"""A recipe whose last stage trains a quantized model, as the subject of a search.

The folder of the search is that of a sweep, so equal stages are computed once, and an interrupted search resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitError
from qatkit.export.format_row import ExportFormat
from qatkit.export.interface import ExportContext
from qatkit.pipeline.export import first_batch, held_out_data
from qatkit.pipeline.runner import run_stages, stage_prints
from qatkit.pipeline.verify import read_verification
from qatkit.quantization.folding import fold_batchnorm
from qatkit.quantization.mixed.overrides import plain_layers
from qatkit.recipe import Recipe
from qatkit.recipe.loading import recipe_to_yaml
from qatkit.run.exports import Exported, exports_of, formats_by_key
from qatkit.run.folder import Run
from qatkit.run.sharing import share_stages, shared_name
from qatkit.schemes import Scheme
from qatkit.tasks.table import declared_task
from qatkit.trials.execution import run_trials
from qatkit.trials.ladder import Rung
from qatkit.trials.promise import split_batches
from qatkit.trials.sensitivity import training_loss
from qatkit.trials.sizes import exported_bytes
from qatkit.trials.smaller import shrink_sizes
from qatkit.trials.sweep import Trial, load_configurations, open_sweep
from qatkit.trials.variants import Variant

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

SENSITIVITY_BATCHES = 16


class TrainedStage:
    """A stage of a finished trial, with its export in the main format."""

    def __init__(self, run: Run, stage: str) -> None:
        self.run = run
        self.exported: Exported = next(each for each in exports_of(run) if each.stage == stage)

    def model(self) -> nn.Module:
        """See `Trained`."""
        return self.run.load_model(self.exported.stage).eval()

    def file(self) -> Path:
        """See `Trained`."""
        return self.exported.path

    def failures(self) -> list[str]:
        """See `Trained`."""
        found = read_verification(self.run, self.exported)
        return [] if found["passed"] else list(found["failures"])


class RecipeSubject:
    """A recipe and the folder of its search, whose lock the caller must hold; see `Subject`.

    Args:
        folder: The folder.
        recipe: Name or path of the recipe.
        fixed: Overrides of all trainings.
        base: The recipe with these overrides.
        allow: Packages whose code the recipe may use.

    Raises:
        QatkitError: no stage trains a quantized model, it does not follow a stage without quantization, or the runtime
            of the main export format does not run in this environment.
    """

    def __init__(self, folder: Path, recipe: str, fixed: Sequence[str], base: Recipe, allow: Sequence[str]) -> None:
        self.folder, self.recipe, self.fixed, self.base, self.allow = folder, recipe, fixed, base, allow
        self.stage = searched_stage(base)
        self.format = measured_format(base)
        self._trials: dict[str, Trial] = {}

    @cached_property
    def data(self) -> LightningDataModule:
        """The data of the last stage, set up for all splits."""
        data = held_out_data(Run(self.base, self.folder, self.allow))
        data.setup("fit")
        return data

    @property
    def task(self) -> Any:
        """See `Subject`."""
        return declared_task(self.data)

    def batches(self, split: Literal["validation", "test"]) -> Any:
        """See `Subject`."""
        return split_batches(self.data, split)

    def prepare(self, variants: Sequence[Variant]) -> None:
        """Train the stages before the last one, which all trials share, after all variants have been validated."""
        for variant in variants[1:]:
            load_configurations(self.recipe, self.fixed, [self._values(self._blocks(variant))], self.allow)
        run = self._before
        if (before := self.base.parent_of(self.stage)) is not None:
            run_stages(run, until=before)

    @cached_property
    def _before(self) -> Run:
        open_sweep(self.folder, self.base, [], [], self.allow)
        out = self.folder / "runs" / "before"
        prints = stage_prints(Run(self.base, out, self.allow))
        share_stages(out, {name: shared_name(name, known.fingerprint) for name, known in prints.items()})
        write_atomically(out / "recipe.yaml", recipe_to_yaml(self.base))
        return Run(self.base, out, self.allow)

    def plain(self, variant: Variant) -> nn.Module:
        """See `Subject`."""
        config = self.base.stages[self.stage]
        if variant == Variant() and config.prune is None and config.shrink is None:
            model = self._before.load_model(self.base.parent_of(self.stage), quantizers=False)
        else:
            pruned = self._trained({"max_steps": 0, "quantize": None, "distill": None, **self._blocks(variant)})
            model = pruned.load_model(self.stage)
        fold_batchnorm(model)
        return model.eval()

    def loss(self) -> Callable[[nn.Module], float]:
        """See `Subject`."""
        return training_loss(self._before, self.base.stages[self.stage].batch_size, SENSITIVITY_BATCHES)

    def select(self) -> dict[str, Sequence[str]]:
        """See `Subject`."""
        config = self.base.stages[self.stage].quantize
        assert config is not None
        return {"include": config.include, "exclude": config.exclude}

    def size(self, model: nn.Module, layers: Mapping[str, Scheme]) -> int:
        """See `Subject`."""
        context = ExportContext(first_batch(self.data), self.task, None, getattr(self.data, "tokenizer", None))
        return exported_bytes(model, layers, self.select(), self.format, context)

    def train(self, variant: Variant, rung: Rung, share: float) -> TrainedStage:
        """See `Subject`. A training that is finished is not repeated."""
        steps = self.base.stages[self.stage].max_steps
        values: dict[str, Any] = {"max_steps": max(1, round(share * steps)) if share else 0}
        if not share:
            values["distill"] = None
        run = self._trained(values | {"quantize.layers": plain_layers(rung.layers)} | self._blocks(variant))
        return TrainedStage(run, self.stage)

    def dense(self) -> TrainedStage:
        """See `Subject`. The first trial exports it."""
        return TrainedStage(self._before, self._before.uncompressed[-1])

    def _blocks(self, variant: Variant) -> dict[str, Any]:
        """The blocks of the last stage that prune and shrink."""
        blocks: dict[str, Any] = {}
        layers = {key: list(globs) for key, globs in self.select().items()}
        if variant.nm is not None:
            blocks["prune"] = {"nm": list(variant.nm), **layers}
        elif variant.sparsity is not None:
            blocks["prune"] = {"sparsity": variant.sparsity, **layers}
        sizes = {} if variant.depth is variant.width is None else shrink_sizes(variant, self._before.build_model())
        return blocks | ({"shrink": sizes} if sizes else {})

    def _values(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return {f"stages.{self.stage}.{key}": value for key, value in own.items()}

    def _trained(self, own: Mapping[str, Any]) -> Run:
        """The finished trial with these values of the last stage."""
        values = self._values(own)
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
        return self._trials[key].run


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


def measured_format(recipe: Recipe) -> ExportFormat:
    """Return the main export format, whose runtime must run in this environment.

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
    return row
