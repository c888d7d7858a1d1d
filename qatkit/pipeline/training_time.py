"""The least time of a recipe's training on a device, by the roofline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qatkit.advise.devices import Device
from qatkit.advise.phases import forward_phases, is_language_model, language_phases
from qatkit.advise.plan import context_of
from qatkit.advise.roofline import LayerCost, call_seconds, training
from qatkit.errors import QatkitError
from qatkit.pipeline.profiling import meta_inputs
from qatkit.recipe import Recipe
from qatkit.run.stage_models import StageModels
from qatkit.tasks import call


def training_times(recipe: Recipe, device: Device, allow: Sequence[str] = ()) -> dict[str, tuple[int, float]]:
    """Return the steps of every stage that trains, and the least seconds of a step.

    A step has three products per layer for each accumulated batch, and the forward pass of a teacher that is not
    cached. The optimizer, fake quantization and the data are not included.

    Args:
        recipe: The recipe.
        device: The device, whose bf16 rate is used if the precision is mixed.
        allow: Packages, in addition to qatkit, whose factories may be used.

    Raises:
        QatkitError: the length of the samples of a language model is unknown.
    """
    models, times = StageModels(recipe, allow), {}
    dtype = "bf16" if recipe.trainer.precision != "32-true" and "bf16" in device.rates else "fp32"
    for name, stage in recipe.stages.items():
        if not stage.max_steps:
            continue
        layers = _forward(recipe, models[name], stage.batch_size, allow)
        spent = call_seconds(training(layers), device, dtype)
        if stage.distill is not None and stage.distill.cache is None:
            teacher = _forward(recipe, models.teacher(name), stage.batch_size, allow)
            spent += call_seconds(teacher, device, dtype)
        times[name] = (stage.max_steps, stage.accumulate * spent)
    return times


def _forward(recipe: Recipe, model: nn.Module, batch: int, allow: Sequence[str]) -> list[LayerCost]:
    model.eval()
    if is_language_model(model):
        if (context := context_of(recipe, allow)) is None:
            raise QatkitError(
                "the data factory has no argument 'context', so the length of the training samples is unknown",
                key="data.factory", advice="pass a folder with a config, or use a factory with this argument",
            )  # fmt: skip
        return language_phases(model, batch, context)["prefill"]
    inputs = meta_inputs(recipe, batch, allow)
    return forward_phases(model, lambda: call(model, inputs))["forward"]
