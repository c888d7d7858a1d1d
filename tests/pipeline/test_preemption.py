"""SIGTERM saves a checkpoint at the next optimizer step; the rerun ends with the bits of an uninterrupted run."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from qatkit.common import termination as module
from qatkit.common.termination import Terminated, Termination
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import resume_advice, run_stages
from tests.pipeline.test_killed_after_the_last_step import BLOCKS, run_of
from tests.support.preempted import run, same, weights

AGAIN = "run the same command again to resume stage 'dense' from the last checkpoint"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder)
    assert (done.returncode, done.stderr) == (0, "")
    return weights(folder)


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stops = {  # an epoch has ten steps; counts start anew in each process
        "data:1": "stage 'dense' has no checkpoint yet; run the same command again to restart it",
        "train:3": f"a checkpoint was saved at step 3; {AGAIN}",
        "train:6": f"a checkpoint was saved at step 9; {AGAIN}",
        "train:1": f"an epoch ended at step 10; {AGAIN}",
        "train:4": f"a checkpoint was saved at step 14; {AGAIN}",  # in an epoch that was not the first to resume
        "validation:1": f"an epoch ended at step 20; {AGAIN}",
        "test:1": AGAIN,  # all steps are trained, and the result is not saved
    }
    for place, message in stops.items():
        done = run(tmp_path, STOP_AT=place)
        assert (done.returncode, done.stderr) == (143, f"terminated by SIGTERM: {message}\n"), place
        assert not (tmp_path / "run" / "run.lock").exists()
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(weights(tmp_path), whole)


def test_a_run_that_is_stopped_during_export_keeps_its_stages(tmp_path: Path) -> None:
    done = run(tmp_path, "stages.dense.max_steps=1", STOP_AT="test:3")
    message = "terminated by SIGTERM: all stages are trained; run the same command again to finish the run\n"
    assert (done.returncode, done.stderr) == (143, message)
    before = (tmp_path / "run" / "stages" / "dense" / "stage.json").stat().st_mtime_ns
    assert run(tmp_path, "stages.dense.max_steps=1").returncode == 0
    assert (tmp_path / "run" / "stages" / "dense" / "stage.json").stat().st_mtime_ns == before


def test_data_that_cannot_continue_within_an_epoch_resume_at_its_start_and_that_is_said(tmp_path: Path) -> None:
    fixed = "data.args={resumable: false}"
    assert run(tmp_path, fixed, out="whole").returncode == 0
    done = run(tmp_path, fixed, STOP_AT="train:13")
    assert done.returncode == 143
    said = "terminated by SIGTERM: DataLoader has no state_dict(), so no checkpoint was saved within the epoch; "
    assert done.stderr == f"{said}{AGAIN}\n"
    assert run(tmp_path, fixed).returncode == 0
    assert same(weights(tmp_path), weights(tmp_path, "whole"))


@pytest.fixture
def stopping() -> Iterator[Termination]:
    """A process that reacts to SIGTERM, without the thread that would end it."""
    module._current = this = Termination(lambda reason: None)
    yield this
    module._current = None


KINDS = BLOCKS | {"accumulation": "accumulate: 3", "distillation": "distill: {temperature: 2}"}
QUICK = ("pruning along a ramp", "quantization", "early stopping", "accumulation")


@pytest.mark.parametrize(
    "block",
    [pytest.param(KINDS[kind], id=kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS],
)
def test_every_kind_of_stage_continues_in_the_middle_of_an_epoch(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Termination
) -> None:
    whole, stopped = run_of(tmp_path / "whole", block), run_of(tmp_path / "stopped", block)
    run_stages(whole, until="tried")
    original, batches = CompressionModule.training_step, iter(range(1, 1000))

    def step(self: Any, *arguments: Any) -> torch.Tensor:
        stopping.received |= next(batches) == 34  # the 14th batch of the second stage
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", step)
        with pytest.raises(Terminated):
            run_stages(stopped)
    assert "saved at step" in stopping.saved
    assert "resume stage 'tried' from the last checkpoint" in resume_advice(stopped)
    saved = torch.load(stopped.folder("tried") / "last.ckpt", weights_only=True)["global_step"]
    assert saved == (6 if "accumulate" in block else 14), "a checkpoint holds complete steps only"
    module._current = None
    assert run_stages(stopped, until="tried") == ["tried"]
    one, two = whole.record("tried"), stopped.record("tried")
    assert (one.zeros, one.folds, one.early_stopping) == (two.zeros, two.folds, two.early_stopping)
    assert one.metrics == two.metrics
    for path in whole.folder("tried").rglob("*.safetensors"):
        assert same(load_file(path), load_file(stopped.out / path.relative_to(whole.out))), path.name


def test_the_metrics_of_the_last_step_before_the_stop_are_logged(tmp_path: Path) -> None:
    run(tmp_path, STOP_AT="train:10")  # the tenth step is logged, and ends an epoch
    rows = csv.DictReader((tmp_path / "run" / "stages" / "dense" / "logs" / "attempt_0" / "metrics.csv").open())
    assert [row["step"] for row in rows if row["train/loss"]] == ["9"]


def test_a_trainer_without_the_command_line_keeps_lightnings_handler() -> None:
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    assert type(Trainer(logger=False, accelerator="cpu")._signal_connector) is _SignalConnector
