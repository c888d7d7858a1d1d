"""Tracking: W&B runs read back from their own records, TensorBoard event files, and trainings that no tracker stops."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from qatkit.callbacks import TextSamples
from transformers import AutoTokenizer

from qatkit.pipeline.module import CompressionModule
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.tracking import Tracking
from qatkit.recipe import StageConfig
from qatkit.run.folder import Run
from tests.data.corpus import save_tokenizer
from tests.models.families import tiny
from tests.support import warm
from tests.support.texts import loader
from tests.support.tracked import Records, read_records, recipe, run_files, stranger, trained
from tests.support.tracked import nobody as nobody

SHORT = ["stages.dense.max_steps=20", "stages.qat.max_steps=30", "model.args.channels=[8,8]"]
STAGES = ["dense", "ptq", "qat"]

KILLED_IN_QAT = """
import os, signal, sys, time
from pathlib import Path
from qatkit.callbacks import CompressionMonitor
from qatkit.cli.main import main
from tests.support.tracked import Records, run_files
original = CompressionMonitor.on_train_batch_end
def die(self, trainer, module, *rest):
    original(self, trainer, module, *rest)
    if trainer.global_step == 25:  # the only stage that is longer is qat
        (path,) = run_files(Path(sys.argv[-1]))  # written by W&B's own process, which the kill ends too
        while sum("qat/train/loss" in row for row in Records(path).history()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
CompressionMonitor.on_train_batch_end = die
main()
"""


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records, Records]:
    folder = tmp_path_factory.mktemp("tracked")
    out = folder / "run"
    arguments = ["run", "vision/digits_int4", *SHORT, "trainer.logger=wandb", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | stranger(folder)
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])  # the first process reads the records
    environment["WANDB__TRANSACTION_LOG_FLUSH_INTERVAL"] = "0.1"  # of W&B's own 15 s, a kill loses what is not written
    # a terminal: W&B asks for an account where it finds one, and would wait here for ever
    keyboard, terminal = pty.openpty()
    options: dict[str, Any] = {"env": environment, "stdin": terminal, "cwd": folder}
    killed = subprocess.run([warm.python(), "-c", KILLED_IN_QAT, *arguments], **options)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([warm.python(), "-m", "qatkit.cli", *arguments], check=True, **options)
    os.close(keyboard)
    os.close(terminal)
    first, second = (Records(path) for path in run_files(out))
    return out, first, second


def test_a_recipe_is_one_offline_run_with_one_id_in_both_processes(
    killed_and_resumed: tuple[Path, Records, Records],
) -> None:
    out, first, second = killed_and_resumed
    assert first.run.run_id == second.run.run_id == (out / "wandb_run_id").read_text().strip()
    assert second.run.resume
    assert all("offline-run" in str(path) for path in run_files(out))
    assert first.run.project == "qatkit"


def test_the_resolved_recipe_is_the_config(killed_and_resumed: tuple[Path, Records, Records]) -> None:
    for records in killed_and_resumed[1:]:
        config = records.config()
        assert config["stages"]["qat"]["max_steps"] == 30
        assert config["stages"]["qat"]["quantize"]["weight"]["num_bits"] == 4
        assert config["trainer"]["precision"] == "32-true"  # a default: resolved, not as written


def test_the_metrics_of_every_stage_are_there_over_the_steps_of_the_stage(
    killed_and_resumed: tuple[Path, Records, Records],
) -> None:
    _, first, second = killed_and_resumed
    curves: dict[str, list[int]] = {}
    for row in [*first.history(), *second.history()]:
        for name in row:
            curves.setdefault(name, []).append(row.get("trainer/global_step", -1))
    assert curves["dense/train/loss"] == [9, 19]
    assert sorted(set(curves["qat/train/loss"])) == [9, 19, 29]
    for stage, steps in (("dense", 20), ("ptq", 0), ("qat", 30)):
        assert curves[f"{stage}/test/accuracy"] == [steps]
    # the last of 30 steps; Lightning itself counts one more where it resumes after a validation
    assert curves["qat/quant/clip_rate"] in ([29], [30])
    assert curves["qat/distill/teacher_agreement"] == curves["qat/quant/clip_rate"]
    names = {name for name in curves if not name.startswith(("_", "trainer/", "comparison"))}
    assert {name.split("/")[0] for name in names} == set(STAGES)
    assert not [name for name in names if "conv" in name]  # never a panel per layer


def test_each_stage_has_one_table_of_its_layers_and_one_histogram_of_its_codes(
    killed_and_resumed: tuple[Path, Records, Records],
) -> None:
    out, first, second = killed_and_resumed
    assert first.typed("table-file") + second.typed("table-file") == Counter(
        {"dense/layers": 1, "ptq/layers": 1, "qat/layers": 1, "comparison": 1}
    )
    assert first.typed("histogram") + second.typed("histogram") == Counter({"ptq/codes": 1, "qat/codes": 1})
    (path,) = out.glob("wandb/offline-run-*/files/media/table/qat/*.table.json")
    table = json.loads(path.read_text())
    names = [row[table["columns"].index("name")] for row in table["data"]]
    assert names == ["model.conv1", "model.conv2", "model.classifier"]


def test_the_report_and_the_exported_models_are_artifacts_that_state_their_parity(
    killed_and_resumed: tuple[Path, Records, Records],
) -> None:
    out, _, second = killed_and_resumed
    artifacts = second.artifacts()
    assert set(artifacts) == {"digits_int4-report", *(f"digits_int4-{stage}" for stage in STAGES)}
    report = {item.path for item in artifacts["digits_int4-report"].manifest.contents}
    assert {"report.html", "report.md", "report.json"} <= report
    for stage in STAGES:
        artifact = artifacts[f"digits_int4-{stage}"]
        metadata = json.loads(artifact.metadata)
        verification = json.loads((out / "export" / stage / "onnx" / "verification.json").read_text())
        assert metadata["parity"] == "passed"
        assert metadata["format"] == "onnx"
        assert (metadata["layers"], metadata["mean_error"]) == (verification["layers"], verification["mean_error"])
        (item,) = artifact.manifest.contents
        assert Path(item.local_path) == (out / "export" / stage / "onnx" / "model.onnx").resolve()
        assert item.size == metadata["bytes"]


def test_the_comparison_is_the_summary_of_the_run(killed_and_resumed: tuple[Path, Records, Records]) -> None:
    out, _, second = killed_and_resumed
    summary = second.summary()
    for row in json.loads((out / "report.json").read_text())["rows"]:
        stage = row["stage"]
        assert summary[f"{stage}/test/accuracy"] == row["test_accuracy"]
        assert summary[f"{stage}/bytes"] == row["bytes"]
        assert summary[f"{stage}/latency_ms/batch_1"] == row["latency"][0]["median_ms"]
        assert summary[f"{stage}/parity"] == "passed"
    (baseline,) = json.loads((out / "report.json").read_text())["baselines"]
    assert summary["quantize_static/runtime/accuracy"] == baseline["runtime_metric"]
    assert summary["quantize_static/bytes"] == baseline["bytes"]


def test_the_curves_are_in_csv_files_too(killed_and_resumed: tuple[Path, Records, Records]) -> None:
    logs = killed_and_resumed[0] / "stages" / "qat" / "logs"
    assert all("train/loss" in (logs / f"attempt_{n}" / "metrics.csv").read_text() for n in range(2))


def test_samples_are_a_table_of_their_stage(nobody: None, tmp_path: Path) -> None:
    tracking = Tracking(Run(recipe("wandb"), tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    samples = TextSamples(3, ["Ada counts the", "Alan"], tmp_path / "samples.jsonl", 4, tokenizer)
    trainer = Trainer(
        accelerator="cpu", max_steps=6, callbacks=[samples], logger=tracking.loggers("dense"),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CompressionModule(tiny("gpt2"), StageConfig(max_steps=6), seed=0), loader(2))
    tracking.close()
    (path,) = run_files(tmp_path / "run")
    while "exit" not in {record.WhichOneof("record_type") for record in read_records(path)}:
        time.sleep(0.05)  # W&B's own process writes the file
    assert Records(path).typed("table-file") == Counter({"dense/samples": 2})
    tables = [
        json.loads(found.read_text()) for found in tmp_path.glob("run/wandb/offline-run-*/files/media/table/**/*.json")
    ]
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted(row for table in tables for row in table["data"]) == sorted(list(row.values()) for row in written)
    assert {tuple(table["columns"]) for table in tables} == {("step", "prompt", "text")}


def test_tensorboard_has_a_folder_of_curves_for_every_stage(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(recipe("tensorboard"), tmp_path)
    run_stages(run)
    boards = {stage: EventAccumulator(str(tmp_path / "tensorboard" / stage)) for stage in STAGES}
    for stage, board in boards.items():
        board.Reload()
        (accuracy,) = board.Scalars("test/accuracy")
        assert accuracy.step == run.recipe.stages[stage].max_steps
        assert accuracy.value == pytest.approx(run.record(stage).metrics["test/accuracy"])
        (written,) = board.Tensors("recipe/text_summary")
        assert b'"max_steps": 10' in written.tensor_proto.string_val[0]
        assert "layers/text_summary" in board.Tags()["tensors"]
    assert [event.step for event in boards["dense"].Scalars("train/loss")] == [9]
    assert [event.step for event in boards["qat"].Scalars("quant/clip_rate")] == [9]
    assert trained(tmp_path, "qat")
