"""Pruning on two gloo processes against one process that accumulates over the same halves."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm

WORKER = Path(__file__).parent / "pruning_worker.py"
KINDS = ("layer", "model", "nm", "movement", "block", "srste", "rewind")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pruning")
    found = {}
    for mode in ("single", "ddp", "fsdp2"):
        out = folder / f"{mode}.pt"
        subprocess.run([warm.python(), str(WORKER), mode, str(out)], check=True, cwd=folder)
        found[mode] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_prune_the_weights_of_one_bit_for_bit(
    results: dict[str, dict[str, Any]], strategy: str, kind: str
) -> None:
    one, two = results["single"][kind], results[strategy][kind]
    assert one["whole"].keys() == two["whole"].keys()
    for key, value in one["whole"].items():
        assert torch.equal(value, two["whole"][key]), key
    assert one["zeros"] == two["zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(
    results: dict[str, dict[str, Any]], strategy: str, kind: str
) -> None:
    result = results[strategy][kind]
    for key, value in result["whole"].items():
        assert torch.equal(value, result["resumed"][key]), key


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_the_record_is_what_the_whole_weights_hold(results: dict[str, dict[str, Any]], strategy: str) -> None:
    result = results[strategy]
    for kind in KINDS:
        counts = {f"model.{i}": int((result[kind]["whole"][f"{i}.weight"] == 0).sum()) for i in (0, 2, 4)}
        assert result[kind]["zeros"] == {name: counts[name] for name in result[kind]["zeros"]}
        assert sum(counts.values()) > 100


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_a_later_training_holds_the_zeros(results: dict[str, dict[str, Any]], strategy: str) -> None:
    before, after = results[strategy]["nm"]["whole"], results[strategy]["held"]
    assert torch.equal(before["0.weight"] == 0, after["0.weight"] == 0)
    assert not torch.equal(before["0.weight"], after["0.weight"])
