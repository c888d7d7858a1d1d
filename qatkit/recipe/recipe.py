"""The top level of a recipe, and the rules that involve more than one stage."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from qatkit.common.ranges import Range, Seed, check_ranges
from qatkit.errors import QatkitError, did_you_mean, under
from qatkit.export.formats import FORMATS
from qatkit.recipe.common import MISSING, FactoryConfig
from qatkit.recipe.evaluate import EvaluateConfig
from qatkit.recipe.expansion import check_rewind, expanded
from qatkit.recipe.schema import BLOCKS
from qatkit.recipe.stage import StageConfig

SCHEMA_VERSION = 1
"""The version of the recipe schema that this qatkit reads and writes."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of Lightning's Trainer, which apply to every stage."""

    accelerator: str = "auto"
    devices: Annotated[int, Range(1, 1024)] | str = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: bool = False
    """Compile the model with torch.compile. The first steps take minutes; later steps are faster."""
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Logger for curves and tables, in addition to CSV files."""

    def __post_init__(self) -> None:
        if isinstance(self.devices, str) and self.devices != "auto":
            raise QatkitError(
                f"'{self.devices}' is not a number of devices", key="devices", advice="use auto or a number such as 2"
            )
        check_ranges(self)


@dataclass(frozen=True)
class ExportConfig:
    """An export format of the trained models."""

    format: str = MISSING
    """A name in `qatkit.export.formats.FORMATS`, such as onnx."""
    python: str | None = None
    """The interpreter of an environment made by ``qatkit environment FORMAT``, in which files are verified; only for
    formats whose runtime needs one.
    """

    def __post_init__(self) -> None:
        if self.format == MISSING:
            return
        row = FORMATS.row(self.format, "format")
        if self.python is not None and not row.environment:
            raise QatkitError(
                f"'{row.name}' files run in the environment of qatkit, so an interpreter has no effect",
                key="python",
                advice="remove it",
            )


@dataclass(frozen=True)
class Recipe:
    """A model, its data, and the ordered training stages. A ``lottery`` block is expanded into stages."""

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    """Version of the recipe schema for which the file was written."""
    name: str = MISSING
    model: FactoryConfig = MISSING
    data: FactoryConfig = MISSING
    stages: dict[str, StageConfig] = MISSING
    seed: Seed = 0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: Any = field(default=None, metadata={BLOCKS: ExportConfig})
    """An `ExportConfig`, or a list of them for several formats; None exports nothing."""
    evaluate: EvaluateConfig | None = None

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        check_ranges(self)
        if self.stages == MISSING:
            return
        self._check_names()
        self._check_formats()
        object.__setattr__(self, "stages", expanded(self.stages, self.seed))
        self._check_references()
        self._check_order()
        if self.trainer.strategy == "fsdp2":
            for name, stage in self.stages.items():
                with under(f"stages.{name}"):
                    _check_sharding(stage)

    def _check_names(self) -> None:
        if not self.stages:
            raise QatkitError(
                "{} has no stages", key="stages", advice="add at least one, such as dense: {max_steps: 600}"
            )
        # names become folders, and names of stages are parts of dotted keys
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise QatkitError(
                f"'{self.name}' is not a valid name", key="name", advice="use letters, digits, _ and - only"
            )
        for name in self.stages:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise QatkitError(
                    f"'{name}' is not a valid name", key=f"stages.{name}", advice="use letters, digits and _ only"
                )
        first = next(iter(self.stages))
        if self.stages[first].model is not None:
            raise QatkitError(
                "the first stage starts from the recipe's model",
                key=f"stages.{first}.model",
                advice="set the top-level model instead",
            )

    def _check_formats(self) -> None:
        if self.export == []:
            raise QatkitError("is empty", key="export", advice="use [{format: onnx}], or remove the key")
        first: dict[str, str] = {}
        for key, config in self.exports.items():
            if (before := first.setdefault(config.format, key)) != key:
                raise QatkitError(
                    f"'{config.format}' is also in {before}, and both would be written to the same files",
                    key=f"{key}.format",
                    advice="list each format once",
                )

    @property
    def exports(self) -> dict[str, ExportConfig]:
        """The export formats by dotted key: ``export``, or ``export[0]`` and so on; the first is the main format."""
        if isinstance(self.export, list):
            return {f"export[{index}]": config for index, config in enumerate(self.export)}
        return {} if self.export is None else {"export": self.export}

    def _check_references(self) -> None:
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            teacher = stage.distill.teacher if stage.distill else None
            for key, wanted in (("start", stage.start), ("distill.teacher", teacher)):
                if wanted is not None and wanted not in names[:position]:
                    raise QatkitError(
                        f"'{wanted}' is not an earlier stage",
                        key=f"stages.{name}.{key}",
                        advice=did_you_mean(wanted, names[:position]),
                    )

    def _check_order(self) -> None:
        """Reject stages whose order would undo, or be undone by, the zeros or grids of an earlier stage."""
        pruned: dict[str | None, bool] = {None: False}
        quantized: dict[str | None, str] = {None: ""}  # the last stage that quantized
        for name, stage in self.stages.items():
            parent = self.parent_of(name)
            held, grid = pruned[parent] and stage.hold_sparsity, quantized[parent]
            pruned[name] = stage.prune is not None or held
            quantized[name] = name if stage.quantize is not None else grid
            with under(f"stages.{name}"):
                if stage.shrink is not None and held:
                    raise QatkitError(
                        "an earlier stage pruned weights, and removing parts of the model would change its sparsity",
                        key="shrink",
                        advice="shrink before prune, or set hold_sparsity: false",
                    )
                if stage.shrink is not None and grid:
                    raise QatkitError(
                        f"stage '{grid}' fitted the weights to the quantization grid of the larger model",
                        key="shrink",
                        advice="shrink before quantize",
                    )
                if pruned[name] and stage.quantize is not None and stage.quantize.moves_zeros:
                    raise QatkitError(
                        f"'{stage.quantize.init}' adjusts the remaining weights after each one that it rounds, which "
                        "would make pruned weights non-zero",
                        key="quantize.init",
                        advice="use awq or mse, or set hold_sparsity: false",
                    )
                if pruned[name] and stage.quantize is not None and (key := stage.quantize.drops_zeros):
                    raise QatkitError(
                        "Q2_K, Q4_K, Q5_K and IQ4_NL have no value for zero, so pruned weights would be non-zero",
                        key=f"quantize.{key}",
                        advice="use Q3_K, Q6_K or Q4_0, or set hold_sparsity: false",
                    )
            if stage.rewind is not None:
                check_rewind(name, self.stages, self._ancestors(name), pruned[name])
            if stage.lora is not None:
                stage.lora.check(f"stages.{name}", pruned[name], self.trainer.strategy == "fsdp2")

    @property
    def written_paths(self) -> dict[str, Path]:
        """The folders in the recipe that qatkit writes to, by dotted key."""
        return {
            f"stages.{name}.distill.cache.folder": Path(stage.distill.cache.folder)
            for name, stage in self.stages.items()
            if stage.distill is not None and stage.distill.cache is not None and stage.distill.cache.folder
        }

    def parent_of(self, name: str) -> str | None:
        """Return the stage that `name` continues from; None if it starts from a factory's model."""
        stage = self.stages[name]
        if stage.start is not None or stage.model is not None:
            return stage.start
        names = list(self.stages)
        position = names.index(name)
        return names[position - 1] if position else None

    def _ancestors(self, name: str) -> list[str]:
        """Stage `name` and the stages that its model comes from, the latest first."""
        line = [name]
        while (parent := self.parent_of(line[-1])) is not None:
            line.append(parent)
        return line

    def teacher_of(self, name: str) -> str | None:
        """Return the stage whose result is the teacher of `name`. The default is the last stage before compression.

        The search follows the stages that `name` continues from. A stage with its own model does not continue from
        another stage; for such a stage, the search starts at the previous stage in the recipe. None stands for the
        recipe's initial model.
        """
        distill = self.stages[name].distill
        if distill is not None and distill.teacher is not None:
            return distill.teacher
        teacher = self._before(name)
        stage: str | None = name
        while stage is not None:
            before = self._before(stage)
            if self.stages[stage].compresses:
                teacher = before
            stage = before
        return teacher

    def _before(self, name: str) -> str | None:
        names = list(self.stages)
        position = names.index(name)
        if self.stages[name].model is not None:
            return names[position - 1] if position else None
        return self.parent_of(name)


def check_schema_version(version: object) -> None:
    """Raise an error if a recipe has a different schema version.

    Example:
        >>> check_schema_version(2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        qatkit.errors.QatkitError: schema_version: this recipe was written for schema 2, but this qatkit reads 1; ...
    """
    if version != SCHEMA_VERSION or type(version) is not int:
        raise QatkitError(
            f"this recipe was written for schema {version}, but this qatkit reads {SCHEMA_VERSION}",
            key="schema_version",
            advice=f"use a version of qatkit that reads schema {version}, or port the recipe",
        )


def _check_sharding(stage: StageConfig) -> None:
    """Reject methods that need unsharded tensors under FSDP2."""
    if stage.prune is not None:
        with under("prune"):
            stage.prune.check_sharding()
    if stage.optimizer != "adamw":
        raise QatkitError(
            f"'{stage.optimizer}' updates complete tensors, but fsdp2 shards them",
            key="optimizer",
            advice="use adamw, or set trainer.strategy: ddp",
        )
