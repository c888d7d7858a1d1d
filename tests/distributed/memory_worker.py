"""Trains stages of a recipe on two processes and writes what tensors took on each, bytes.

Usage: memory_worker.py RECIPE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from qatkit.loading import load_recipe
from tests.memory import measured

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


def overrides(case: str) -> list[str]:
    """What a case changes in the recipe."""
    return ["trainer.devices=2", f"trainer.strategy={case.split()[-1]}", *CASES[case][1]]


def main(recipe: str, out: Path) -> None:
    torch.set_num_threads(1)
    # in one pair of processes: starting them takes most of the time
    found = {
        case: measured(load_recipe(recipe, overrides(case)), stage, out / case) for case, (stage, _) in CASES.items()
    }
    (out / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
