"""The loss of a text is the mean over all tokens of a step: two processes against one process with one large batch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from qatkit.tasks import evaluate
from tests.pipeline.test_module import gradients
from tests.support import warm
from tests.support.texts import loader, tiny_llama

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("language")
    worker = Path(__file__).parent / "language_worker.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [warm.python(), str(worker), str(folder / "out.pt")]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    found: dict[str, Any] = torch.load(folder / "out.pt", weights_only=True)
    return found


@pytest.mark.parametrize("mode", ["ddp", "ddp, accumulated", "fsdp2, accumulated"])
def test_two_processes_give_the_gradient_of_the_one_large_batch(results: dict[str, Any], mode: str) -> None:
    for name, gradient in gradients(batch_size=8, accumulate=1).items():
        found = results[mode]["gradients"][name.removeprefix("model.")]
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2, accumulated"])
def test_validation_on_two_processes_counts_every_token_once(results: dict[str, Any], mode: str) -> None:
    model = tiny_llama()
    model.load_state_dict(results[mode]["state"])
    for name, value in evaluate(model, loader(8)).items():
        assert results[mode]["metrics"][f"val/{name}"] == pytest.approx(value, rel=1e-5)
