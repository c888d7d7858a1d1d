"""Every number of a recipe has a range: a value that torch cannot hold, or that nobody means, names its key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from qatkit.common.ranges import INT32, INT64, ranges_of
from qatkit.errors import QatkitError
from qatkit.recipe import Recipe
from qatkit.recipe.schema import read
from tests.support.recipes import GOOD, assert_says, refusal

BOUNDED_ELSEWHERE = {
    "Recipe.schema_version": "one value",
    "QuantSpec.num_bits": "the widths of its element type",
    "QuantSpec.percentile": "50 to 100",
    "DistillConfig.teacher_bits": "8 or 4",
    "LoraConfig.bits": "8 or 4",
    "LotteryConfig.rewind": "a number of steps, or a word",
    "QuantSpec.group_size": "the inputs of the layer",
    # a number of parts or a fraction of them, and the model has no more parts than it has
    **dict.fromkeys([f"ShrinkConfig.{key}" for key in ("layers", "heads", "kv_heads", "neurons", "hidden")], "parts"),
    "ShrinkConfig.channels": "a fraction",
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(GOOD)
    return path


def blocks(cls: type[Any], seen: set[type[Any]] | None = None) -> Iterator[type[Any]]:
    """A block of the schema and all blocks inside it."""
    seen = set() if seen is None else seen
    if cls in seen:
        return
    seen.add(cls)
    yield cls
    for hint in get_type_hints(cls).values():
        for part in parts(hint):
            if is_dataclass(part):
                yield from blocks(part, seen)  # type: ignore[arg-type]  # a class, not an instance


def parts(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType, dict, list, Annotated):
        for part in get_args(hint):
            yield from parts(part)
    else:
        yield hint


def numbers() -> list[tuple[type[Any], str, type[Any]]]:
    found = []
    for block in blocks(Recipe):
        hints = get_type_hints(block)
        for field in fields(block):
            options = get_args(hints[field.name]) if get_origin(hints[field.name]) in (Union, UnionType) else ()
            for kind in (int, float):
                if hints[field.name] is kind or kind in options:
                    found.append((block, field.name, kind))
    return found


def test_every_number_of_the_schema_has_a_range() -> None:
    names = {f"{block.__name__}.{key}" for block, key, _ in numbers()}
    without = {f"{block.__name__}.{key}" for block, key, _ in numbers() if key not in ranges_of(block)}
    assert len(names) > 40
    assert without == set(BOUNDED_ELSEWHERE)


@pytest.mark.parametrize(("block", "key", "kind"), numbers(), ids=lambda part: getattr(part, "__name__", part))
def test_a_number_that_torch_cannot_hold_names_its_key(block: type[Any], key: str, kind: type[Any]) -> None:
    for value in (10**20, -(10**20)) if kind is int else (1e39, -1e39, float("inf"), float("nan")):
        with pytest.raises(QatkitError, match=rf"^block\.{key}: .* does not fit in|^block\.{key}: .* not a finite"):
            read(get_type_hints(block)[key], value, f"block.{key}")


@pytest.mark.parametrize(
    ("override", "key", "parts"),
    [
        ("stages.qat.max_steps=100000000000000000000", "stages.qat.max_steps", ["64 bits", f"up to {INT64}"]),
        ("stages.qat.max_steps=3000000000", "stages.qat.max_steps", [f"integer of at most {INT32}"]),
        ("stages.qat.max_steps=-1", "stages.qat.max_steps", ["-1 is out of range", "a non-negative integer"]),
        ("stages.qat.batch_size=100000000000000000000", "stages.qat.batch_size", ["64 bits"]),
        ("seed=100000000000000000000", "seed", ["64 bits"]),
        ("seed=-1", "seed", ["-1 is out of range", "a non-negative integer"]),
        ("trainer.devices=100000000000000000000", "trainer.devices", ["64 bits"]),
        ("trainer.devices=100000", "trainer.devices", ["at most 1024"]),
        ("model.args.hidden=[100000000000000000000]", "model.args.hidden[0]", ["64 bits"]),
        ("model.args.x=1e39", "model.args.x", ["does not fit in a float32"]),
        ("stages.qat.lr=1e38", "stages.qat.lr", ["1e+38 is out of range", "at most 100, such as 1e-3"]),
        ("stages.qat.lr=1e39", "stages.qat.lr", ["does not fit in a float32"]),
        ("stages.qat.lr=-0.1", "stages.qat.lr", ["-0.1 is out of range", "a positive number, such as 1e-3"]),
        ("stages.qat.weight_decay=1e30", "stages.qat.weight_decay", ["at most 10000"]),
        ("stages.qat.warmup=1.5", "stages.qat.warmup", ["1.5 is out of range", "from 0 to 1"]),
        ("stages.qat.decay=0", "stages.qat.decay", ["0.0 is out of range", "a positive number of at most 1"]),
        ("stages.qat.distill.temperature=1e30", "stages.qat.distill.temperature", ["at most 10000"]),
        ("stages.qat.distill.cache.top_k=3000000000", "stages.qat.distill.cache.top_k", [f"at most {INT32}"]),
        ("stages.dense.lora.rank=100000000000000000000", "stages.dense.lora.rank", ["64 bits"]),
        ("stages.dense.lora.rank=3000000000", "stages.dense.lora.rank", [f"at most {INT32}"]),
        ("stages.dense.lottery={rounds: 1000000}", "stages.dense.lottery.rounds", ["at most 1000"]),
        (
            "stages.dense.prune={ramp: {final: 0.5, power: 0}}",
            "stages.dense.prune.ramp.power",
            ["a positive number, such as 3"],
        ),
        ("stages.dense.prune={ramp: {final: 0.5, initial: -1}}", "stages.dense.prune.ramp.initial", ["below 1"]),
        ("evaluate={context: 1}", "evaluate.context", ["1 is out of range", "at least 2"]),
        (
            "stages.qat.quantize.weight={strategy: group, group_size: 3000000000}",
            "stages.qat.quantize.weight.group_size",
            [f"at most {INT32}"],
        ),
        (
            "stages.qat.quantize.weight={strategy: block, block_structure: [1, 3000000000]}",
            "stages.qat.quantize.weight.block_structure",
            [f"at most {INT32}"],
        ),
    ],
)
def test_a_number_out_of_range_names_its_key_and_the_range(
    recipe_file: Path, override: str, key: str, parts: list[str]
) -> None:
    assert_says(refusal(recipe_file, override), key, *parts)
