"""Expand a ``lottery`` block into its stages, and check ``rewind`` blocks against the stages before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qatkit.recipe.lottery import LotteryConfig, PartConfig, RewindConfig
from qatkit.recipe.prune import PruneConfig
from qatkit.recipe.stage import StageConfig


def expanded(stages: Mapping[str, StageConfig], seed: int) -> dict[str, StageConfig]:
    """The stages with every ``lottery`` block replaced by those that it stands for.

    Raises:
        ValueError: the block does not go together with its stage, or a name is taken.
    """
    found: dict[str, StageConfig] = {}
    zeros: dict[str | None, bool] = {None: False}
    last: str | None = None
    for name, stage in stages.items():
        held = stage.model is None and stage.hold_sparsity and zeros.get(stage.start or last, False)
        if held and stage.lottery is not None:
            raise ValueError(
                f"stages.{name}.lottery: it starts from a dense model, and an earlier stage has made zeros; write "
                "hold_sparsity: false to let them grow again"
            )
        zeros[name] = held or stage.prune is not None or stage.lottery is not None
        last = name
        before = next(reversed(found), None)
        more = {name: stage} if stage.lottery is None else _rounds(name, stage, stage.lottery, before, seed)
        for each in more:
            if each in found or (each != name and each in stages):
                raise ValueError(f"stages.{each}: the lottery block of '{name}' makes a stage of this name; rename one")
        found |= more
        if stage.lottery is not None and stage.lottery.reinit and name != list(stages)[-1]:
            raise ValueError(
                f"stages.{name}.lottery.reinit: true makes '{name}_reinit' the input of the stages after it, and that "
                "is the control; write reinit: false, or put the stage last"
            )
    return found


def _rounds(
    name: str, stage: StageConfig, lottery: LotteryConfig, before: str | None, seed: int
) -> dict[str, StageConfig]:
    for block in ("model", "shrink", "prune", "quantize", "lora", "rewind", "part", "early_stopping"):
        if getattr(stage, block) is not None:
            raise ValueError(
                f"stages.{name}.{block}: it has no meaning beside lottery, which stands for several stages; write it "
                "in a stage of its own"
            )
    first = lottery.rewind if isinstance(lottery.rewind, int) else 0
    if first >= stage.max_steps:
        raise ValueError(
            f"stages.{name}.lottery.rewind: {first} is not before the end of its {stage.max_steps} steps; write fewer"
        )
    before = stage.start or before
    plain = replace(stage, lottery=None, hold_sparsity=True, start=None)
    dense = replace(stage, lottery=None, distill=None)  # the dense model is who may teach the rounds
    found: dict[str, StageConfig] = {}
    rest: dict[str, Any] = {"max_steps": stage.max_steps}
    if first:
        found[f"{name}_start"] = replace(dense, max_steps=first, part=PartConfig(stage.max_steps))
        dense = replace(dense, start=None)
        rest = {"max_steps": stage.max_steps - first, "part": PartConfig(stage.max_steps, first)}
    found[f"{name}_0"] = replace(dense, **rest)
    rewind = None if lottery.rewind == "learning_rate" else RewindConfig(f"{name}_start" if first else before)
    for number in range(1, lottery.rounds + 1):
        sparsity = round(1 - (1 - lottery.share) ** number, 10)
        if sparsity == 1:
            raise ValueError(
                f"stages.{name}.lottery.rounds: {lottery.rounds} rounds that prune {lottery.share} each leave no "
                "weight; write fewer"
            )
        prune = PruneConfig(sparsity, scope=lottery.scope, include=lottery.include, exclude=lottery.exclude)
        found[f"{name}_{number}"] = replace(plain, **rest, prune=prune, rewind=rewind)
    if lottery.reinit:
        found[f"{name}_reinit"] = replace(plain, rewind=RewindConfig(seed=seed + 1))
    return found


def check_rewind(name: str, stages: Mapping[str, StageConfig], line: Sequence[str], zeros: bool) -> None:
    """Refuse to go back to weights that do not fit, or where no zeros are.

    Args:
        name: The stage that rewinds.
        stages: All stages.
        line: The stages that it goes back to, the last first and with itself.
        zeros: Whether the stage has zeros.

    Raises:
        ValueError: says which stage is in the way.
    """
    rewind = stages[name].rewind
    assert rewind is not None
    if rewind.stage is not None and rewind.stage not in line[1:]:
        raise ValueError(
            f"stages.{name}.rewind.stage: '{rewind.stage}' is no earlier stage of the same model; write one of "
            f"{line[:0:-1]}"
        )
    if not zeros:
        raise ValueError(
            f"stages.{name}.rewind: the stage has no zeros to put weights under; write prune: {{sparsity: 0.5}} beside "
            "it"
        )
    for each in line[: line.index(rewind.stage)] if rewind.stage is not None else line:
        if stages[each].quantize is not None or stages[each].lora is not None:
            block = "quantizes" if stages[each].quantize is not None else "trains adapters"
            raise ValueError(
                f"stages.{name}.rewind: stage '{each}' {block}, which changes the layers that weights would go back "
                "to; do it in a stage after the last rewind"
            )
        if (stages[each].model or stages[each].shrink) and (rewind.seed is None or each == name):
            raise ValueError(
                f"stages.{name}.rewind: stage '{each}' makes the model another one; go back to a stage after it"
            )
