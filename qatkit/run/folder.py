"""A run, which is a recipe with the folder of its results. It provides paths, records and models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qatkit.common.walls import check_links, check_path
from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig, Recipe
from qatkit.recipe.factories import build
from qatkit.run.architecture import Architecture, build_architecture
from qatkit.run.compatibility import with_tokenizer
from qatkit.run.fingerprint import refuse_other_recipe
from qatkit.run.record import StageRecord, read_record
from qatkit.run.sharing import shared_stages, sweep_folder
from qatkit.run.stage_files import load_stage
from qatkit.run.stage_models import StageModels, starting_model

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


class Run:
    """A recipe and the folder of its results.

    Args:
        recipe: The recipe.
        out: The run's folder, which is created when the first stage starts.
        allow: Packages, in addition to `qatkit`, whose code the recipe may use.
        allow_write: Files and folders outside the run's folder that may be written to.
    """

    def __init__(self, recipe: Recipe, out: Path, allow: Sequence[str] = (), allow_write: Sequence[Path] = ()) -> None:
        self.recipe = recipe
        self.out = out
        self.allow = tuple(allow)
        self.allow_write = tuple(allow_write)
        self._shared = shared_stages(out)

    def check_writes(self, training: bool = False) -> None:
        """Raise an error if files outside the run's folder would be written or deleted; call it before every write.

        Args:
            training: Whether folders in the recipe will be written to as well.

        Raises:
            QatkitError: the recipe contains a folder outside the run's folder, or a link in the run's folder leads
                outside.
        """
        for key, path in self.recipe.written_paths.items() if training else ():
            check_path(path, self.out, self.allow_write, key)
        for folder in (self.out, *self._shared.values()):
            check_links(folder, self.allow_write)

    def check_recipe(self) -> None:
        """Raise an error if finished stages were trained with a different recipe.

        Raises:
            QatkitError: a value differs.
        """
        for stage in self.recipe.stages:
            if (record := self.find(stage)) is not None:
                refuse_other_recipe(stage, record.inputs, self.recipe, self.out / "recipe.yaml")

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's files; runs of a sweep share the folders of equal stages."""
        return self._shared.get(stage, self.out / "stages" / stage)

    def is_shared(self, stage: str) -> bool:
        """Whether a stage's files and exports may belong to several runs of a sweep."""
        return stage in self._shared

    def export_folder(self, stage: str) -> Path:
        """Return the folder of a stage's exports, one folder per format."""
        return self.folder(stage) / "export" if self.is_shared(stage) else self.out / "export" / stage

    def recorded_from(self, stage: str) -> Path:
        """Return the folder to which paths in the records of a stage's exports are relative."""
        return sweep_folder(self.out) if self.is_shared(stage) else self.out

    def build_model(self, architecture: Architecture | None = None, seed: int | None = None) -> nn.Module:
        """Build a model with its factory, with reproducible initial weights.

        Args:
            architecture: The architecture to build. The default is the recipe's model.
            seed: Seed for the initial weights, which overrides the recipe's seed.
        """
        torch.manual_seed(self.recipe.seed if seed is None else seed)
        return build_architecture(architecture or Architecture(self.recipe.model), self.allow)

    def build_data(self, batch_size: int) -> LightningDataModule:
        """Build the recipe's data; the recipe's seed determines the order."""
        from lightning.pytorch import LightningDataModule

        config = with_tokenizer(self.recipe.data, self.recipe.model, self.allow)
        data = build(config, "data", self.allow, batch_size=batch_size, seed=self.recipe.seed)
        if not isinstance(data, LightningDataModule):
            raise QatkitError(
                f"'{self.recipe.data.factory}' returned {type(data).__name__}",
                key="data.factory",
                advice="return a LightningDataModule",
            )
        return data

    def load_model(self, stage: str | None, quantizers: bool = True) -> nn.Module:
        """Load the model of a finished stage on the CPU.

        Args:
            stage: The stage's name; None loads the model before the first stage.
            quantizers: Whether to include the fake quantizers; False returns plain layers with latent weights.
        """
        record = self.find(stage) if stage is not None else None
        model = self.build_model(record.architecture if record else None)
        if stage is not None:
            load_stage(self.folder(stage), model, quantizers)
        return model

    def start_model(self, stage: str) -> nn.Module:
        """Return the input model of a stage, before its own `shrink` block, with plain layers on the CPU."""

        def built(factory: FactoryConfig, key: str) -> nn.Module:
            return self.build_model(Architecture(factory))

        return starting_model(self.recipe, stage, built, lambda parent: self.load_model(parent, quantizers=False))

    def stage_models(self) -> StageModels:
        """Return the models of all stages on the meta device; finished stages have their recorded architecture."""

        def recorded(stage: str) -> Architecture | None:
            record = self.find(stage)
            return record.architecture if record is not None else None

        return StageModels(self.recipe, self.allow, recorded)

    def is_original(self, stage: str) -> bool:
        """Whether a stage starts from the factory's weights, unchanged by any earlier stage."""
        if self.recipe.stages[stage].shrink is not None:
            return False
        if (before := self.recipe.parent_of(stage)) is None:
            return True
        changed = self.recipe.stages[before]
        return changed.max_steps == 0 and not changed.compresses and self.is_original(before)

    def find(self, stage: str) -> StageRecord | None:
        """Return the record of a stage, or None if it is not finished."""
        return read_record(self.folder(stage))

    def record(self, stage: str) -> StageRecord:
        """Return the record of a finished stage.

        Raises:
            QatkitError: the stage is not finished.
        """
        record = self.find(stage)
        if record is None:
            raise QatkitError(
                f"stage '{stage}' of {self.out} is not finished: {self.folder(stage) / 'stage.json'} does not exist",
                advice="use `qatkit run` to finish the stage",
            )
        return record

    @property
    def rows(self) -> list[str]:
        """Return the stages in the comparison: the last one before compression or adapters, and all later ones."""
        names = list(self.recipe.stages)
        return names[max(len(self.uncompressed) - 1, 0) :]

    @property
    def uncompressed(self) -> list[str]:
        """Return the stages before the first that compresses the model or adds adapters."""
        stages = self.recipe.stages
        return list(takewhile(lambda name: not stages[name].compresses and stages[name].lora is None, stages))
