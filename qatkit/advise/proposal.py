"""The recipe that carries out a plan."""

from __future__ import annotations

from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from qatkit.advise.advice import Plan
from qatkit.advise.situation import Situation
from qatkit.advise.smaller import shrink_block
from qatkit.recipe import Recipe
from qatkit.recipe.strict_yaml import dump_yaml

_DATA_CONTEXT = 512
"""Longest training samples of the recipe for a config."""
_BATCH = 8
"""Batch size of the recipe for a config."""


def recipe_text(base: Recipe | Path, plan: Plan, situation: Situation) -> str:
    """Return the recipe of a plan as YAML, with comments about what must be known before it is run.

    Args:
        base: The recipe of the model, or the folder with its config.
        plan: The plan.
        situation: The situation of the plan.
    """
    notes = [f"{plan.name} for {situation.device.name}, proposed by qatkit advise."]
    if isinstance(base, Path):
        content, size = _content_of_config(base, situation.context), _BATCH
        notes.append("Replace data, which is the source code of Python's standard library, by your own.")
    else:
        content, size = _content_of_recipe(base), next(iter(base.stages.values())).batch_size
        if (dropped := left_out(base)) is not None:
            notes.append(f"{dropped[0].upper()}{dropped[1:]}.")
    stages = {name: {**stage, "batch_size": size} for name, stage in stages_of(plan, situation).items()}
    content |= {"stages": content["stages"] | stages, "export": {"format": plan.option.export}}
    return "".join(f"# {note}\n" for note in notes) + dump_yaml(content)


def left_out(base: Recipe) -> str | None:
    """Return what a plan does not take over from a recipe, None if it takes over everything.

    The plan replaces the first stage that compresses the model or trains adapters, and all later ones.
    """
    dropped = [f"stage '{name}'" for name in list(base.stages)[len(_kept(base)) :]]
    dropped += ["the evaluate block"] * (base.evaluate is not None)
    return f"the plan leaves out parts of the recipe: {', '.join(dropped)}" if dropped else None


def _kept(base: Recipe) -> dict[str, Any]:
    stages = takewhile(lambda stage: not stage[1].compresses and stage[1].lora is None, base.stages.items())
    return {name: asdict(stage) for name, stage in stages}


def _content_of_recipe(base: Recipe) -> dict[str, Any]:
    content = {key: value for key, value in asdict(base).items() if key not in ("stages", "export", "evaluate")}
    return content | {"stages": _kept(base) or {"dense": {"max_steps": 0}}}


def _content_of_config(folder: Path, context: int) -> dict[str, Any]:
    return {
        "name": folder.resolve().name.replace(" ", "_"),
        "model": {"factory": "qatkit.models:causal_lm", "args": {"name_or_path": str(folder)}},
        "data": {"factory": "qatkit.data:stdlib_text", "args": {"context": min(context, _DATA_CONTEXT)}},
        "stages": {"dense": {"max_steps": 0}},
    }


def stages_of(plan: Plan, situation: Situation) -> dict[str, Any]:
    """Return the stages that carry out a plan, after a dense stage."""
    distill = {"temperature": 1.0 if situation.language else 4.0, "alpha": 0.7}
    training = {"lr": 1e-4 if situation.language else 1e-3, "warmup": 0.05, "distill": distill}
    stages: dict[str, Any] = {}
    if plan.smaller:
        stages["smaller"] = {"max_steps": 1000, "shrink": shrink_block(situation.model, situation.family), **training}
    quantize = dict(plan.option.quantize)
    if situation.language:
        quantize["exclude"] = [_head(situation.model)]
    if plan.method == "QAT + KD":
        if "scheme" in quantize:
            quantize["observer"] = "lsq"
        stages["qat"] = {"max_steps": 500, "quantize": quantize, **training}
    else:
        if plan.option.gptq:
            quantize |= {"init": "gptq", "observer": "mse"}
        stages["ptq"] = {"max_steps": 0, "quantize": quantize}
    return stages


def _head(model: Any) -> str:
    """The name of the output layer of a language model, which is not quantized."""
    output = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is output)
    return name
