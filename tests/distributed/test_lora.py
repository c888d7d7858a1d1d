"""Adapters on two processes equal those that one process trains on the same samples."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatkit import quantize
from tests.distributed.lora_worker import SPEC, main, network
from tests.support import warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
MODES = [f"{kind} {strategy}" for kind in ("lora", "dora", "qat", "sparse") for strategy in ("ddp", "fsdp2")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("lora")
    worker = Path(__file__).parent / "lora_worker.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [warm.python(), str(worker), "two", str(folder / "two.pt")]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    main("single", folder / "single.pt")
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "single.pt", weights_only=True)
    return found | torch.load(folder / "two.pt", weights_only=True)


@pytest.mark.parametrize("mode", [*MODES, "qlora ddp"])
def test_two_processes_train_and_merge_what_one_does(results: dict[str, dict[str, Tensor]], mode: str) -> None:
    alone, together = results[mode.split()[0]], results[mode]
    assert sorted(alone) == sorted(together)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)
    assert (together["0.weight"] - network()[0].weight).abs().max() > 1e-3, "something was trained"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_codes_are_the_same_and_zeros_stay(results: dict[str, dict[str, Tensor]], strategy: str) -> None:
    def codes(state: dict[str, Tensor]) -> Tensor:
        scale = state["0.weight_fake_quant.scale"]
        return quantize(state["0.weight"], scale, torch.zeros_like(scale), SPEC)

    assert torch.equal(codes(results[f"qat {strategy}"]), codes(results["qat"]))
    assert not results[f"sparse {strategy}"]["0.weight"][:, ::2].any()
    assert results[f"sparse {strategy}"]["0.weight"][:, 1::2].all()
