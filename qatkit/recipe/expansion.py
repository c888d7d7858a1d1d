"""Expand ``lottery`` blocks into stages, and check ``rewind`` blocks against the preceding stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qatkit.errors import QatkitError
from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig
from qatkit.recipe.prune import PruneConfig
from qatkit.recipe.stage import StageConfig


def expanded(stages: Mapping[str, StageConfig], seed: int) -> dict[str, StageConfig]:
    """Expand every stage that has a ``lottery`` block into multiple stages.

    Args:
        stages: The stages of a recipe by name, in order.
        seed: The recipe's seed; the control run of a lottery initializes its weights with the next seed.

    Raises:
        QatkitError: the block conflicts with its stage, or two stages would have the same name.
    """
    result: dict[str, StageConfig] = {}
    sparse: dict[str | None, bool] = {None: False}
    last: str | None = None
    for name, stage in stages.items():
        inherited = stage.model is None and stage.hold_sparsity and sparse.get(stage.start or last, False)
        if inherited and stage.lottery is not None:
            raise QatkitError(
                "lottery tickets need a dense model, but an earlier stage has pruned it",
                key=f"stages.{name}.lottery",
                advice="set hold_sparsity: false to let the pruned weights grow again",
            )
        sparse[name] = inherited or stage.prune is not None or stage.lottery is not None
        last = name
        before = next(reversed(result), None)
        new = {name: stage} if stage.lottery is None else _rounds(name, stage, stage.lottery, before, seed)
        for each in new:
            if each in result or (each != name and each in stages):
                raise QatkitError(
                    f"the lottery block of '{name}' creates a stage of the same name",
                    key=f"stages.{each}",
                    advice="rename one of the two stages",
                )
        result |= new
        if stage.lottery is not None and stage.lottery.reinit and name != list(stages)[-1]:
            raise QatkitError(
                f"the next stage would continue from the control '{name}_reinit'",
                key=f"stages.{name}.lottery.reinit",
                advice="set reinit: false, or put the stage last",
            )
    return result


def _rounds(
    name: str, stage: StageConfig, lottery: LotteryConfig, before: str | None, seed: int
) -> dict[str, StageConfig]:
    """Expand the lottery block of one stage."""
    for block in ("model", "shrink", "prune", "quantize", "lora", "rewind", "part", "early_stopping"):
        if getattr(stage, block) is not None:
            raise QatkitError(
                f"{block} cannot be combined with lottery, which expands into multiple stages",
                key=f"stages.{name}.{block}",
                advice="move the block to a separate stage",
            )
    rewind_step = lottery.rewind if isinstance(lottery.rewind, int) else 0
    if rewind_step >= stage.max_steps:
        raise QatkitError(
            f"{rewind_step} is not below max_steps={stage.max_steps}",
            key=f"stages.{name}.lottery.rewind",
            advice="rewind to an earlier step",
        )
    before = stage.start or before
    plain = replace(stage, lottery=None, hold_sparsity=True, start=None)
    dense = replace(stage, lottery=None, distill=None)  # the dense model is the teacher of the rounds
    result: dict[str, StageConfig] = {}
    rest: dict[str, Any] = {"max_steps": stage.max_steps}
    if rewind_step:
        result[f"{name}_start"] = replace(dense, max_steps=rewind_step, part=PartConfig(stage.max_steps))
        dense = replace(dense, start=None)
        rest = {"max_steps": stage.max_steps - rewind_step, "part": PartConfig(stage.max_steps, rewind_step)}
    result[f"{name}_0"] = replace(dense, **rest)
    rewind = None if lottery.rewind == "learning_rate" else RewindConfig(f"{name}_start" if rewind_step else before)
    for number in range(1, lottery.rounds + 1):
        sparsity = round(1 - (1 - lottery.fraction) ** number, 10)
        if sparsity == 1:
            raise QatkitError(
                f"{lottery.rounds} rounds that prune {lottery.fraction} each leave no weights",
                key=f"stages.{name}.lottery.rounds",
                advice="use fewer rounds",
            )
        prune = PruneConfig(sparsity, scope=lottery.scope, include=lottery.include, exclude=lottery.exclude)
        result[f"{name}_{number}"] = replace(plain, **rest, prune=prune, rewind=rewind)
    if lottery.reinit:
        result[f"{name}_reinit"] = replace(plain, rewind=RewindConfig(seed=seed + 1))
    return result


def check_rewind(name: str, stages: Mapping[str, StageConfig], line: Sequence[str], sparse: bool) -> None:
    """Raise an error if the weights of a rewind do not match the model, or if the stage has no sparsity mask.

    Args:
        name: The stage that rewinds.
        stages: All stages.
        line: The stage itself and its ancestors, latest first.
        sparse: Whether the stage has pruned weights.

    Raises:
        QatkitError: the rewind is impossible; the error includes the stage that prevents it.
    """
    rewind = stages[name].rewind
    assert rewind is not None
    key = f"stages.{name}.rewind"
    if rewind.stage is not None and rewind.stage not in line[1:]:
        earlier = line[:0:-1]
        raise QatkitError(
            f"'{rewind.stage}' is not an earlier stage of the same model",
            key=f"{key}.stage",
            advice=f"use one of {', '.join(earlier)}" if earlier else "remove stage",
        )
    if not sparse:
        raise QatkitError(
            "the stage has no pruned weights, so there is no mask to keep",
            key=key,
            advice="also set prune: {sparsity: 0.5}",
        )
    for each in line[: line.index(rewind.stage)] if rewind.stage is not None else line:
        if stages[each].quantize is not None or stages[each].lora is not None:
            action = "quantizes" if stages[each].quantize is not None else "trains adapters"
            raise QatkitError(
                f"stage '{each}' {action}, which changes the layers whose weights would be restored",
                key=key,
                advice=f"move the block of '{each}' to a stage after the last rewind",
            )
        if (stages[each].model or stages[each].shrink) and (rewind.seed is None or each == name):
            raise QatkitError(
                f"stage '{each}' changes the architecture",
                key=key,
                advice=f"rewind to '{each}' or a later stage" if each != name else "move rewind to a later stage",
            )
