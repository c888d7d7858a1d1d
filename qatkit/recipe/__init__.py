"""A recipe: typed, frozen data that says what happens to a model, stage by stage.

These classes are the whole vocabulary of a recipe file. They import nothing heavy: reading a recipe takes a fraction of
a second, and a mistake in it is found before a model or a data set is touched. `qatkit.recipe.loading` reads YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from qatkit.recipe.common import MISSING, FactoryConfig
from qatkit.recipe.distill import AttentionConfig, CacheConfig, DistillConfig, GenerationConfig, HiddenConfig
from qatkit.recipe.evaluate import EvaluateConfig
from qatkit.recipe.expansion import check_rewind, expanded
from qatkit.recipe.lora import LoraConfig
from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig
from qatkit.recipe.prune import PruneConfig, RampConfig
from qatkit.recipe.quantize import LayerConfig, QuantizeConfig
from qatkit.recipe.shrink import ShrinkConfig
from qatkit.recipe.stage import ScheduleName, StageConfig
from qatkit.recipe.watching import EarlyStoppingConfig, SamplesConfig

__all__ = [
    "MISSING",
    "AttentionConfig",
    "CacheConfig",
    "DistillConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FactoryConfig",
    "GenerationConfig",
    "HiddenConfig",
    "LayerConfig",
    "LoraConfig",
    "LotteryConfig",
    "PartConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RampConfig",
    "Recipe",
    "RewindConfig",
    "SamplesConfig",
    "ScheduleName",
    "ShrinkConfig",
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
    compile: bool = False
    """Hand the model to torch.compile: the first steps take minutes, those after them less."""
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

    format: Literal["onnx", "dense", "sparse", "compressed_tensors"] = MISSING
    """ONNX; safetensors with the rounded weights, or with those that are not zero; or codes and scales in a folder for
    transformers and vLLM."""


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
    evaluate: EvaluateConfig | None = None

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
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            teacher = stage.distill.teacher if stage.distill else None
            for key, wanted in (("start", stage.start), ("distill.teacher", teacher)):
                if wanted is not None and wanted not in names[:position]:
                    raise ValueError(
                        f"stages.{name}.{key}: '{wanted}' is no earlier stage; write one of {names[:position]}"
                    )
        zeros: dict[str | None, bool] = {None: False}
        grids: dict[str | None, str] = {None: ""}  # the last stage that quantized
        for name, stage in self.stages.items():
            parent = self.parent_of(name)
            held, quantized = zeros[parent] and stage.hold_sparsity, grids[parent]
            if stage.shrink is not None and held:
                raise ValueError(
                    f"stages.{name}.shrink: an earlier stage made zeros, and what is cut out would change their share; "
                    "shrink before prune, or write hold_sparsity: false"
                )
            if stage.shrink is not None and quantized:
                raise ValueError(
                    f"stages.{name}.shrink: stage '{quantized}' has fitted the weights to a grid of the larger model; "
                    "shrink before quantize"
                )
            zeros[name] = stage.prune is not None or held
            grids[name] = name if stage.quantize is not None else quantized
            if zeros[name] and stage.quantize is not None and stage.quantize.init == "gptq":
                raise ValueError(
                    f"stages.{name}.quantize.init: 'gptq' corrects weights for each other, and would move the zeros; "
                    "write awq or mse, or hold_sparsity: false"
                )
            if stage.rewind is not None:
                check_rewind(name, self.stages, self._line_of(name), zeros[name])
            method = stage.prune.method if stage.prune is not None else None
            if method in ("wanda", "sparsegpt", "taylor") and self.trainer.strategy == "fsdp2":
                raise ValueError(
                    f"stages.{name}.prune.method: '{method}' needs whole weights, and fsdp2 shards them; write "
                    "magnitude, or trainer.strategy: ddp"
                )
            if stage.optimizer != "adamw" and self.trainer.strategy == "fsdp2":
                raise ValueError(
                    f"stages.{name}.optimizer: '{stage.optimizer}' updates whole tensors, and fsdp2 shards them; write "
                    "adamw, or trainer.strategy: ddp"
                )
            if stage.lora is not None:
                stage.lora.check(f"stages.{name}", zeros[name], self.trainer.strategy == "fsdp2")

    def parent_of(self, name: str) -> str | None:
        """The stage whose model stage `name` goes on with; None where it begins with the recipe's or its own."""
        stage = self.stages[name]
        if stage.start is not None or stage.model is not None:
            return stage.start
        names = list(self.stages)
        position = names.index(name)
        return names[position - 1] if position else None

    def _line_of(self, name: str) -> list[str]:
        """The stages that stage `name` goes back to, the last first and with itself."""
        line = [name]
        while (parent := self.parent_of(line[-1])) is not None:
            line.append(parent)
        return line

    def teacher_of(self, name: str) -> str | None:
        """The stage whose result teaches stage `name`: the named one, else the model before the first compression.

        This is looked for on the way of stages that `name` goes on with. A stage with a model of its own goes on with
        none, and learns as the stage before it in the recipe does. None stands for the recipe's model as its factory
        made it.
        """
        distill = self.stages[name].distill
        if distill is not None and distill.teacher is not None:
            return distill.teacher
        found = self._before(name)
        stage: str | None = name
        while stage is not None:
            before = self._before(stage)
            if self.stages[stage].compresses:
                found = before
            stage = before
        return found

    def _before(self, name: str) -> str | None:
        names = list(self.stages)
        position = names.index(name)
        if self.stages[name].model is not None:
            return names[position - 1] if position else None
        return self.parent_of(name)
