"""Recipes: typed, frozen data that describes an experiment stage by stage.

The configuration classes define all keys of a recipe file. They are cheap to import, so a mistake in a recipe is
reported before a model or dataset is loaded. `qatkit.recipe.loading` reads recipes from YAML.
"""

from qatkit.recipe.common import MISSING, FactoryConfig
from qatkit.recipe.distill import AttentionConfig, CacheConfig, DistillConfig, GenerationConfig, HiddenConfig
from qatkit.recipe.evaluate import EvaluateConfig
from qatkit.recipe.lora import LoraConfig
from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig
from qatkit.recipe.prune import PruneConfig, RampConfig
from qatkit.recipe.quantize import LayerConfig, QuantizeConfig
from qatkit.recipe.recipe import SCHEMA_VERSION, ExportConfig, Recipe, TrainerConfig
from qatkit.recipe.shrink import ShrinkConfig
from qatkit.recipe.stage import ScheduleName, StageConfig
from qatkit.recipe.watching import EarlyStoppingConfig, SamplesConfig

__all__ = [
    "MISSING",
    "SCHEMA_VERSION",
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
