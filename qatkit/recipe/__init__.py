"""A recipe: typed, frozen data that says what happens to a model, stage by stage.

These classes are the whole vocabulary of a recipe file. They import nothing heavy: reading a recipe takes a fraction of
a second, and a mistake in it is found before a model or a data set is touched. `qatkit.loading` makes them from YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from qatkit.recipe.common import MISSING, FactoryConfig
from qatkit.recipe.distill import DistillConfig
from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig, expanded
from qatkit.recipe.prune import PruneConfig, RampConfig
from qatkit.recipe.quantize import LayerConfig, QuantizeConfig
from qatkit.recipe.stage import StageConfig

__all__ = [
    "MISSING",
    "DistillConfig",
    "ExportConfig",
    "FactoryConfig",
    "LayerConfig",
    "LotteryConfig",
    "PartConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RampConfig",
    "Recipe",
    "RewindConfig",
    "StageConfig",
    "TrainerConfig",
]


@dataclass(frozen=True)
class TrainerConfig:
    """What is handed to Lightning's Trainer, the same for every stage."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    """Where curves and tables go besides CSV files."""

    def __post_init__(self) -> None:
        if isinstance(self.devices, str) and self.devices != "auto":
            raise ValueError(f"devices: '{self.devices}' is no number of devices; write auto or a number such as 2")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"devices: {self.devices} is out of range; write auto or a number of at least 1")


@dataclass(frozen=True)
class ExportConfig:
    """The file format that the results are written in."""

    format: Literal["onnx", "dense"] = MISSING


@dataclass(frozen=True)
class Recipe:
    """A model, its data, and the ordered stages it goes through; a ``lottery`` block becomes its stages at once."""

    name: str = MISSING
    model: FactoryConfig = MISSING
    data: FactoryConfig = MISSING
    stages: dict[str, StageConfig] = MISSING
    seed: int = 0
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig | None = None

    def __post_init__(self) -> None:
        if self.stages == MISSING:
            return
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} is out of range; write a whole number from 0 to 2**63 - 1")
        if not self.stages:
            raise ValueError("stages: {} has no stage; write at least one, such as dense: {max_steps: 600}")
        # names become folders, and those of stages are parts of dotted keys
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name: '{self.name}' is no plain name; write letters, digits, _ and - only")
        for name in self.stages:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"stages.{name}: '{name}' is no plain name; write letters, digits and _ only")
        first = next(iter(self.stages))
        if self.stages[first].model is not None:
            raise ValueError(f"stages.{first}.model: no stage comes before it; write it as the recipe's model")
        object.__setattr__(self, "stages", expanded(self.stages, self.seed))
        self._check_zeros()
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            wanted = stage.distill.teacher if stage.distill else None
            if wanted is not None and wanted not in names[:position]:
                raise ValueError(
                    f"stages.{name}.distill.teacher: '{wanted}' is no earlier stage; write one of {names[:position]}"
                )

    def compressed(self, name: str) -> bool:
        """Whether what a stage leaves is compressed: the stage compresses, or holds zeros that an earlier one made."""
        zeros = False
        for stage_name, stage in self.stages.items():
            zeros = stage.holds_zeros(zeros)
            if stage_name == name:
                return zeros or stage.compresses
        raise KeyError(name)

    def _check_zeros(self) -> None:
        """What stages say of zeros and of going back must fit the stages before them."""
        zeros = False
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            if stage.rewind is not None:
                self._check_rewind(name, names[:position], stage.holds_zeros(zeros))
            method = stage.prune.method if stage.prune is not None else "magnitude"
            if method in ("wanda", "sparsegpt", "taylor") and self.trainer.strategy == "fsdp2":
                raise ValueError(
                    f"stages.{name}.prune.method: '{method}' needs whole weights, and fsdp2 shards them; write "
                    "magnitude, or trainer.strategy: ddp"
                )
            zeros = stage.holds_zeros(zeros)
            if zeros and stage.quantize is not None and stage.quantize.init == "gptq":
                raise ValueError(
                    f"stages.{name}.quantize.init: 'gptq' corrects weights for each other, and would move the zeros; "
                    "write awq or mse, or hold_sparsity: false"
                )

    def _check_rewind(self, name: str, earlier: list[str], zeros: bool) -> None:
        stage = self.stages[name]
        assert stage.rewind is not None
        target = stage.rewind.stage
        if target is not None and target not in earlier:
            raise ValueError(f"stages.{name}.rewind.stage: '{target}' is no earlier stage; write one of {earlier}")
        if not zeros:
            raise ValueError(
                f"stages.{name}.rewind: the stage has no zeros to put weights under; write prune: {{sparsity: 0.5}} "
                "beside it"
            )
        since = earlier.index(target) + 1 if target is not None else 0
        for between in [*earlier[since if stage.rewind.seed is None else len(earlier) :], name]:
            if self.stages[between].model is not None:
                raise ValueError(
                    f"stages.{name}.rewind: stage '{between}' begins with another model; go back to a stage after it"
                )
        for before in [*earlier, name]:
            if self.stages[before].quantize is not None:
                raise ValueError(
                    f"stages.{name}.rewind: stage '{before}' quantizes, which changes the layers that weights would "
                    "go back to; quantize in a stage after the last rewind"
                )

    def teacher_of(self, name: str) -> str | None:
        """The stage whose result teaches stage `name`: the named one, else the input of the first compressing stage.

        None stands for the recipe's model as its factory made it.
        """
        distill = self.stages[name].distill
        if distill is not None and distill.teacher is not None:
            return distill.teacher
        before: str | None = None
        for stage_name, stage in self.stages.items():
            if stage.compresses or stage_name == name:
                return before
            before = stage_name
        raise KeyError(name)
