"""Train stages of a recipe on two processes and write the tensor memory of each, in bytes.

Usage: memory_worker.py RECIPE OUT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from qatkit.recipe.loading import load_recipe
from tests.support.memory import measured

CASES = {
    "full ddp": ("dense", []),
    "full fsdp2": ("dense", []),
    "weights above all ddp": ("dense", ["stages.dense.batch_size=1", "model.args.hidden=192"]),
    "weights above all fsdp2": ("dense", ["stages.dense.batch_size=1", "model.args.hidden=192"]),
    "lora ddp": ("dense", ["stages.dense.lora={rank: 8}"]),
    "lora fsdp2": ("dense", ["stages.dense.lora={rank: 8}"]),
    "qlora ddp": ("dense", ["stages.dense.lora={rank: 8, bits: 4}"]),
    "qat and kd ddp": ("qat", []),
    "qat and kd fsdp2": ("qat", []),
}
# of FSDP2, by their names in torch 2.13 and before
COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")


def overrides(case: str) -> list[str]:
    """The overrides of a case."""
    return ["trainer.devices=2", f"trainer.strategy={case.split()[-1]}", *CASES[case][1]]


def freed_here(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective so that its work is dropped by the calling thread, in which the profiler sees frees.

    Gloo's own thread holds the tensors of its work a moment longer than the caller waits, and the profiler never
    counts a free in that thread: the peak would differ from run to run by whole blocks.
    """

    def waiting(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = collective(*args, async_op=True, **kwargs)
        work.wait()
        time.sleep(0.01)
        return work if async_op else None

    return waiting


def main(recipe: str, out: Path) -> None:
    torch.set_num_threads(1)
    for name in COLLECTIVES:
        if hasattr(distributed, name):
            setattr(distributed, name, freed_here(getattr(distributed, name)))
    # in one pair of processes: starting them takes most of the time
    found = {
        case: measured(load_recipe(recipe, overrides(case)), stage, out / case) for case, (stage, _) in CASES.items()
    }
    (out / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
