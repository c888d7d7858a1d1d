"""Distillation with features, learned maps and a ramp on two gloo processes against one that accumulates."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
from qatkit.callbacks.features import FeatureMatch, HiddenMatch
from torch import nn

from tests.support import warm

WORKER = Path(__file__).parent / "distillation_worker.py"


def run(mode: str, folder: Path) -> dict[str, Any]:
    out = folder / f"{mode}.pt"
    subprocess.run([warm.python(), str(WORKER), mode, str(out)], check=True, cwd=folder)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def test_two_processes_train_the_student_and_the_learned_maps_as_one_does_bit_for_bit(tmp_path: Path) -> None:
    one, two = run("single", tmp_path), run("ddp", tmp_path)
    assert one["state"].keys() == two["state"].keys()
    for part in ("state", "maps"):
        for key, value in one[part].items():
            assert torch.equal(two[part][key], value), key
    # equal results would prove nothing if the maps had not been trained
    match = FeatureMatch(HiddenMatch({"1": "1"}, widths=(16, 24)), None)
    match.attach(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), ["1"])
    start = match.projections
    assert start is not None
    assert (one["maps"]["maps.0.weight"] - start.state_dict()["maps.0.weight"]).abs().max() > 1e-2


def test_sharded_students_are_distilled_as_one_process_does(tmp_path: Path) -> None:
    one, sharded = run("whole", tmp_path)["state"], run("fsdp2", tmp_path)["state"]
    assert one.keys() == sharded.keys()
    for key, value in one.items():
        torch.testing.assert_close(sharded[key], value, rtol=1e-5, atol=1e-6)
