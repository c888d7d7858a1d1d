"""Running a recipe: hand-off on disk, resuming, and refusing what has changed."""

from __future__ import annotations

import csv
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from qatkit import QatkitError
from qatkit.data import digits
from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.quantization.prepare import qat_layers
from qatkit.recipe.loading import load_recipe
from qatkit.run.checkpoint import save_checkpoint
from qatkit.run.folder import Run
from qatkit.run.record import Started, write_started
from tests.support import warm
from tests.support.waiting import wait_for

SHORT = ["stages.dense.max_steps=40", "stages.qat.max_steps=30", "model.args.channels=[8,8]"]


def start(out: Path, *overrides: str) -> Run:
    return Run(load_recipe("vision/digits_int4", [*SHORT, *overrides]), out)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    run = start(tmp_path_factory.mktemp("finished"))
    assert run_stages(run) == ["dense", "ptq", "qat"]
    return run


def test_a_stage_leaves_plain_weights_that_its_factory_model_loads(finished: Run) -> None:
    weights = load_file(finished.folder("dense") / "model" / "model.safetensors")
    assert weights.keys() == finished.build_model().state_dict().keys()
    assert not (finished.folder("dense") / "quantizers.safetensors").exists()


def test_a_quantized_stage_loads_back_as_the_model_that_was_measured(finished: Run) -> None:
    record = finished.record("qat")
    model = finished.load_model("qat").eval()
    assert [name for name, _ in qat_layers(model)] == ["conv1", "conv2", "classifier"]
    data = finished.build_data(64)
    from qatkit.tasks import evaluate

    measured = {name: record.metrics[f"test/{name}"] for name in ("loss", "accuracy")}
    assert evaluate(model, data.test_dataloader()) == measured


def test_post_training_quantization_leaves_the_folded_weights_as_they_were(finished: Run) -> None:
    from qatkit.quantization.folding import fold_batchnorm

    dense = finished.load_model("dense")
    fold_batchnorm(dense)
    for key, value in load_file(finished.folder("ptq") / "model" / "model.safetensors").items():
        assert torch.equal(value, dense.state_dict()[key]), key


def test_quantization_aware_training_trains_weights_biases_and_scales(finished: Run) -> None:
    before, after = (load_file(finished.folder(name) / "model" / "model.safetensors") for name in ("ptq", "qat"))
    for key, value in after.items():
        assert not torch.equal(value, before[key]), key
    before, after = (load_file(finished.folder(name) / "quantizers.safetensors") for name in ("ptq", "qat"))
    assert not torch.equal(before["conv1.weight.scale"], after["conv1.weight.scale"])


def test_running_again_trains_nothing_and_touches_nothing(finished: Run) -> None:
    times = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if "stages" in path.parts}
    assert run_stages(finished) == []
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_changed_value_is_refused_by_its_name_and_the_stages_stay(finished: Run) -> None:
    with pytest.raises(QatkitError, match=r"stage 'qat'.*\n  stages\.qat\.distill\.alpha: was 0\.7, is now 0\.2;"):
        run_stages(start(finished.out, "stages.qat.distill.alpha=0.2"))
    with pytest.raises(QatkitError, match=r"stage 'dense'.*\n  seed: was 7, is now 8;"):
        run_stages(start(finished.out, "seed=8"))
    assert finished.record("qat")


def test_force_runs_the_changed_stage_and_those_after_it_only(finished: Run, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    before = (out / "stages" / "dense" / "stage.json").stat().st_mtime_ns
    assert run_stages(start(out, "stages.qat.lr=1e-4"), force=True) == ["qat"]
    assert run_stages(start(out, "stages.qat.lr=1e-4", "stages.ptq.quantize.weight.num_bits=8"), force=True) == [
        "ptq",
        "qat",
    ]
    assert (out / "stages" / "dense" / "stage.json").stat().st_mtime_ns == before


def test_until_stops_after_the_named_stage_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path, "stages.dense.max_steps=5")
    assert run_stages(run, until="ptq") == ["dense", "ptq"]
    assert run.find("qat") is None
    with pytest.raises(QatkitError, match=r"--until: 'tpq' is not a stage; did you mean 'ptq'\?"):
        run_stages(run, until="tpq")


def test_a_started_stage_that_changed_is_refused_too(tmp_path: Path) -> None:
    run = start(tmp_path, "stages.dense.max_steps=5")
    run.folder("dense").mkdir(parents=True)
    from qatkit.run.fingerprint import stage_inputs

    write_started(run.folder("dense"), Started({**stage_inputs(run.recipe, "dense"), "stages.dense.lr": 0.5}, "x"))
    (run.folder("dense") / "last.ckpt").touch()
    with pytest.raises(QatkitError, match=r"was started with different values:\n  stages\.dense\.lr: was 0\.5"):
        run_stages(run)
    (run.folder("dense") / "last.ckpt").unlink()  # it ended before its first checkpoint: a mistake that is mended now
    assert run_stages(run, until="dense") == ["dense"]


COMMAND = """
import signal, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from qatkit.recipe.loading import load_recipe
from qatkit.pipeline.runner import run_stages
from qatkit.run.folder import Run
out, kill_after, *overrides = sys.argv[1:]
signal.setitimer(signal.ITIMER_PROF, float(kill_after))  # of processor time; SIGPROF ends a process as SIGKILL does
started = time.process_time()
run_stages(Run(load_recipe("vision/digits_int4", overrides), Path(out)))
signal.setitimer(signal.ITIMER_PROF, 0)
Path(out, "seconds").write_text(str(time.process_time() - started))
"""


KILLED = ["stages.dense.max_steps=150", "stages.qat.max_steps=150", "model.args.channels=[8,8]"]


def launch(out: Path, python: str | None = None, kill_after: float = 0) -> subprocess.Popen[bytes]:
    """Start a run; it is killed after this many seconds of its own processor time, whatever else the machine does."""
    command = [python or warm.python(), "-c", COMMAND, str(out), str(kill_after), *KILLED]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run and its seconds of processor time; its order of sets is that of no other process."""
    out = tmp_path_factory.mktemp("whole")
    assert launch(out, sys.executable).wait() == 0
    return out, float((out / "seconds").read_text())


def kill_at_random_times(out: Path, seconds: float) -> list[float]:
    """Start a run again and again until it ends; returns when it was killed."""
    generator, kills = random.Random(time.time_ns()), []
    for _ in range(40):
        kill_after = generator.uniform(0.2, 1.0 if kills else 0.5) * seconds
        process = launch(out, kill_after=kill_after)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGPROF, kills
        kills.append(kill_after)
    return kills


@pytest.mark.slow
def test_a_run_killed_at_random_times_ends_with_the_same_bits(tmp_path: Path, whole: tuple[Path, float]) -> None:
    for share in (1.0, 0.5, 0.25):  # a machine that has less to do than before may end a run before it is killed
        out = tmp_path / str(share)
        if kills := kill_at_random_times(out, share * whole[1]):
            break
    assert kills, "the first attempt finished before it could be killed"
    assert files(out) == files(whole[0]), kills


@pytest.mark.slow
def test_a_stage_killed_in_the_middle_continues_at_its_checkpoint(tmp_path: Path, whole: tuple[Path, float]) -> None:
    process = launch(tmp_path)
    checkpoint = tmp_path / "stages" / "qat" / "last.ckpt"
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < done < 150
    finished = (tmp_path / "stages" / "dense" / "stage.json").stat().st_mtime_ns

    assert launch(tmp_path).wait() == 0
    logs = tmp_path / "stages" / "qat" / "logs" / "attempt_1" / "metrics.csv"
    steps = [int(row["step"]) for row in csv.DictReader(logs.open())]
    assert min(steps) >= done, "the second attempt repeated steps that were saved"
    assert (tmp_path / "stages" / "dense" / "stage.json").stat().st_mtime_ns == finished
    assert files(tmp_path) == files(whole[0])


def test_a_batch_larger_than_the_data_is_refused_before_an_earlier_stage_is_trained(tmp_path: Path) -> None:
    run = start(tmp_path, "stages.qat.batch_size=2000")
    with pytest.raises(
        QatkitError,
        match=r"^stages\.qat\.batch_size: 2000 exceeds the 1257 training samples, .*at most 1257",
    ):
        run_stages(run)
    assert not (tmp_path / "stages").exists()


class OwnLoaders(LightningDataModule):
    """Somebody's data, whose size only its loader knows."""

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.data = digits(batch_size=batch_size, seed=seed)
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.data.train, batch_size=self.batch_size, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()


def test_a_batch_larger_than_data_of_unknown_size_is_an_error_and_no_finished_stage(tmp_path: Path) -> None:
    own = "data={factory: 'tests.pipeline.test_pipeline:OwnLoaders'}"
    run = start(tmp_path, "stages.dense.batch_size=2000", own)
    run.allow = ("tests",)
    with pytest.raises(
        QatkitError, match=r"stages\.dense: training ended at step 0 of 40: the data has only 0 batches"
    ):
        run_stages(run)
    assert run.find("dense") is None


def test_a_checkpoint_is_not_continued_on_another_number_of_processes(tmp_path: Path) -> None:
    run = start(tmp_path)
    folder = run.folder("dense")
    folder.mkdir(parents=True)
    save_checkpoint({}, folder / "last.ckpt")
    from qatkit.run.fingerprint import fingerprint, stage_inputs

    inputs = stage_inputs(run.recipe, "dense")
    write_started(folder, Started(inputs, fingerprint(inputs, None), processes=4))
    with pytest.raises(QatkitError, match=r"trainer.devices: stage 'dense' was started with 4 processes but would"):
        run_stages(run)


def test_files_count_with_their_content_and_long_lists_are_no_files(tmp_path: Path) -> None:
    from qatkit.run.fingerprint import changed_keys, stage_inputs

    (tmp_path / "a.txt").write_text("one")
    settings = [f'data.args={{"files": ["{tmp_path}/a.txt"], "name": "train"}}', f"model.args.channels={[8] * 200}"]
    recipe = start(tmp_path, *settings).recipe
    before = stage_inputs(recipe, "dense")
    (tmp_path / "a.txt").write_text("two")
    (changed,) = changed_keys(before, stage_inputs(recipe, "dense"))
    assert changed.startswith("data.args.files[0] (content): was ")
    assert changed_keys({"x": 1}, {"x": 1.0}) == ["x: was 1, is now 1.0"]


def test_ctrl_c_ends_with_130_and_says_that_the_run_continues(tmp_path: Path) -> None:
    command = [warm.qatkit(), "run", "vision/digits_int4", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "stages" / "dense" / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "run the same command again to resume stage 'dense' from the last checkpoint" in errors


@pytest.mark.filterwarnings("ignore:training.*skipped:qatkit.errors.QatkitWarning")
def test_a_stage_whose_loss_becomes_nan_keeps_its_checkpoint_and_continues_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ill = start(tmp_path / "whole"), start(tmp_path / "ill")
    run_stages(whole, until="dense")
    original = CompressionModule.training_step

    def overflowing(self: CompressionModule, *args: Any) -> torch.Tensor:
        loss = original(self, *args)
        return loss * torch.inf if self.trainer.global_step >= 25 else loss

    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", overflowing)
        with pytest.raises(QatkitError) as caught:
            run_stages(ill, until="dense")
    checkpoint = ill.folder("dense") / "last.ckpt"
    assert "the loss was non-finite in 10 consecutive steps, up to step 35" in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 19
    run_stages(ill, until="dense")
    assert files(ill.out) == files(whole.out)
