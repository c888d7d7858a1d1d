"""A sweep computes equal stages once, survives kills, records failures, and ends in one page."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file

from qatkit.common.records import write_signed
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from tests.cli.in_process import qatkit
from tests.report.test_page import FLAGS
from tests.support import warm
from tests.support.browser import chromium
from tests.support.preempted import same

RECIPE = """\
name: swept
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "qatkit.data:digits", args: {val_fraction: 0.1, test_fraction: 0.1}}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 8, batch_size: 32}
  prune: {max_steps: 4, batch_size: 32, prune: {sparsity: 0.5}}
  qat: {max_steps: 4, batch_size: 32, distill: {temperature: 2}, quantize: {weight: {num_bits: 4}}}
export: {format: dense}
"""
BITS, SPARSITY = "stages.qat.quantize.weight.num_bits", "stages.prune.prune.sparsity"
FOUR = (f"{BITS}=2,4", f"{SPARSITY}=0.5,0.8")


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "swept.yaml").write_text(RECIPE)
    return subprocess.Popen(
        [warm.qatkit(), "sweep", "swept.yaml", "--out", "out", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def attempts(folder: Path) -> dict[str, int]:
    """How often each stage was trained."""
    return {each.name: len(list(each.glob("logs/*"))) for each in sorted((folder / "out" / "stages").iterdir())}


def weights(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "out" / "stages").glob("*/model/*.safetensors"))
    return {f"{file.parent.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}


def outcome(folder: Path) -> list[Any]:
    """The results without their latencies and times."""
    results = json.loads((folder / "out" / "results.json").read_text())["results"]
    return [[each["trials"], each["values"], each["row"]["test_accuracy"], each["row"]["bytes"]] for each in results]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of four configurations, two at a time."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = ended(started(folder, *FOUR, "--jobs", "2"))
    assert (code, err) == (0, ""), out
    return folder


def test_equal_stages_are_computed_once_and_shared_without_links(whole: Path) -> None:
    trained = attempts(whole)
    assert sorted(name.partition("-")[0] for name in trained) == ["dense", *["prune"] * 2, *["qat"] * 4]
    assert set(trained.values()) == {1}
    assert not [path for path in (whole / "out").rglob("*") if path.is_symlink()]
    assert not list((whole / "out" / "runs").rglob("*.safetensors"))


def test_every_file_is_a_result_once_with_the_values_that_it_depends_on(whole: Path) -> None:
    shown = {(tuple(trials), tuple(values.items())) for trials, values, *_ in outcome(whole)}
    assert shown == {
        ((1, 2, 3, 4), ()),
        ((1, 3), ((SPARSITY, 0.5),)),
        ((2, 4), ((SPARSITY, 0.8),)),
        ((1,), ((BITS, 2), (SPARSITY, 0.5))),
        ((2,), ((BITS, 2), (SPARSITY, 0.8))),
        ((3,), ((BITS, 4), (SPARSITY, 0.5))),
        ((4,), ((BITS, 4), (SPARSITY, 0.8))),
    }


def test_optuna_reads_the_trials(whole: Path) -> None:
    accuracies = {tuple(trials): accuracy for trials, _, accuracy, _ in outcome(whole)}
    loaded = study(whole)
    assert loaded.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    found = {trial.user_attrs["configuration"]: trial for trial in loaded.trials}
    assert {number: trial.values[0] for number, trial in found.items()} == {n: accuracies[n,] for n in (1, 2, 3, 4)}
    assert found[3].params == {BITS: "4", SPARSITY: "0.5"}


def study(folder: Path) -> optuna.Study:
    path = str(folder / "out" / "trials.log")
    storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    return optuna.load_study(study_name="sweep", storage=storage)


@pytest.mark.medium
def test_a_run_of_a_sweep_is_a_run_folder_for_other_commands(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    assert qatkit("verify", "out/runs/2", cwd=tmp_path).code == 0
    done = qatkit("report", "out/runs/2", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "out" / "runs" / "2" / "report.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["dense", "prune", "qat"]
    changed = ("stages.dense.lr=1e-2", "--out", "out/runs/2", "--force", "--no-report")
    done = qatkit("run", "out/runs/2/recipe.yaml", *changed, cwd=tmp_path)
    assert done.code == 2
    assert "stage 'dense' belongs to a sweep, and its inputs have changed" in done.err


@pytest.mark.medium
def test_a_killed_sweep_resumes_and_ends_as_an_undisturbed_one(whole: Path, tmp_path: Path) -> None:
    process = started(tmp_path, *FOUR)
    wait_for(lambda: bool(list(tmp_path.glob("out/stages/qat-*"))), process)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/stages/*/stage.json")}
    assert len(kept) >= 2
    code, out, err = ended(started(tmp_path, *FOUR))
    assert (code, err) == (0, ""), out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert same(weights(tmp_path), weights(whole))
    assert outcome(tmp_path) == outcome(whole)


def test_a_failed_configuration_is_named_and_a_known_one_is_not_computed_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    code, out, err = ended(started(tmp_path, "stages.qat.batch_size=32,5000"))
    assert code == 2
    assert "6 configurations, 5 of them already finished" in out  # a batch of 32 is what the recipe has
    assert "configuration 6 failed: stages.qat.batch_size: 5000 exceeds the 1437 training samples" in err
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["failures"]) == ["6"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 6 configurations failed: 6" in text
    assert "5000 exceeds the 1437 training samples" in text


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record, and sign it again."""
    content = json.loads(path.read_text())
    content.pop("digest")
    change(content)
    write_signed(path, content, content.pop("schema"))


def test_a_failed_verification_is_finished_and_said_everywhere(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    folder = Run(load_recipe(tmp_path / "out/runs/3/recipe.yaml"), tmp_path / "out/runs/3").export_folder("qat")
    failed = {"passed": False, "text": "a code differs"}
    rewritten(folder / "dense" / "verification.json", lambda content: content.update(failed))
    code, out, err = ended(started(tmp_path, *FOUR))
    assert (code, "4 of them already finished" in out) == (1, True), err
    assert "verification of 'qat' failed in configuration 3: a code differs" in err
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Verification of &#39;qat&#39; failed in configuration 3: a code differs" in text
    assert '<span class="FAILED">verification failed</span><small>qat</small><small>runs/3</small>' in text
    assert text.count("finished<small>runs/") == 3


def test_a_metric_that_is_not_a_number_does_not_end_the_sweep(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    (tmp_path / "out" / "trials.log").unlink()
    folder = Run(load_recipe(tmp_path / "out/runs/3/recipe.yaml"), tmp_path / "out/runs/3").folder("qat")
    rewritten(folder / "stage.json", lambda content: content["metrics"].update({"test/accuracy": math.nan}))
    for _ in range(2):
        code, out, err = ended(started(tmp_path, *FOUR))
        assert (code, err) == (0, ""), out
    assert "nan%" in (tmp_path / "out" / "report.html").read_text()
    states = [(trial.user_attrs["configuration"], trial.state.name) for trial in study(tmp_path).trials]
    assert sorted(states) == [(1, "COMPLETE"), (2, "COMPLETE"), (3, "FAIL"), (4, "COMPLETE")]


def test_a_format_that_was_added_to_a_run_is_kept_and_compared(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    done = qatkit("export", "out/runs/3", "--format", "onnx", cwd=tmp_path)
    assert done.code == 0, done.err
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.onnx")}
    assert len(files) == 3
    more = (f"{BITS}=2,4,8", FOUR[1])  # their shared stages have the files, too
    code, out, err = ended(started(tmp_path, *more))
    assert (code, err) == (0, ""), out
    assert {path: path.stat().st_mtime_ns for path in files if path.exists()} == files
    content = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len([each for each in content if each["row"]["format"] == "onnx"]) == 3


REFUSED = {
    (f"{BITS}=2,40",): f"{BITS}: ",
    ("stages.qat.quantize.weight.num_bit=2,4",): "stages.qat.quantize.weight.num_bit: ",
    ("stages.qta.lr=1e-3,1e-4",): "stages.qta: no such stage; did you mean 'qat'?",
    ("model.args.hidden=[16],[-1]",): "model.args",
    (f"{BITS}=4",): "KEY=VALUES: no key has multiple values",
    (f"{BITS}=4,4",): f"{BITS}: 4 is listed twice",
    (f"{BITS}=2,3", f"{BITS}=4"): f"{BITS}: the key is set twice",
    (BITS,): "is not key=value,value",
    (f"{BITS}=2,4", "export=null"): "export: a sweep compares exported files",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_bad_value_is_refused_before_anything_is_trained(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "swept.yaml").write_text(RECIPE)
    done = qatkit("sweep", "swept.yaml", *arguments, "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert REFUSED[arguments] in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_sweep_or_other_files_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "swept.yaml").write_text(RECIPE)
    shutil.copytree(whole / "out", tmp_path / "out")
    done = qatkit("sweep", "swept.yaml", *FOUR, "seed=1", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert "sweep of another recipe:\n  seed: was 0, is now 1" in done.err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    done = qatkit("sweep", "swept.yaml", *FOUR, "--out", "other", cwd=tmp_path)
    assert done.code == 2
    assert "the folder is not empty, and contains no sweep" in done.err


@pytest.mark.medium
@pytest.mark.parametrize("width", [1240, 390])
def test_the_page_fits_on_a_desktop_and_on_a_phone(whole: Path, width: int) -> None:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.goto((whole / "out" / "report.html").as_uri())
        assert said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#results-accuracy table.sweep tbody tr").count() == 7
        assert page.get_by_text("on the Pareto front").count() >= 1
        assert page.locator("svg[data-figure]").count() == 1  # size; latency is not measured for this format
        table = page.locator("table.sweep")
        assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
        browser.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


ONNX = (f"{BITS}=2,4,8", f"{SPARSITY}=0.5,0.8", "model.args.hidden=[16],[32]", "export.format=onnx", "--jobs", "2")


@pytest.mark.slow
def test_twelve_configurations_survive_kills_and_share_the_dense_stages(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, out, err = ended(started(tmp_path / "a", *ONNX))
    assert (code, err) == (0, ""), out
    trained = attempts(tmp_path / "a")
    assert sorted(name.partition("-")[0] for name in trained) == ["dense"] * 2 + ["prune"] * 4 + ["qat"] * 12
    assert set(trained.values()) == {1}
    for stages in (1, 4, 9):
        process = started(tmp_path / "b", *ONNX)
        wait_for(lambda stages=stages: len(list((tmp_path / "b").glob("out/stages/*/stage.json"))) >= stages, process)
        process.kill()
        process.wait()
    code, out, err = ended(started(tmp_path / "b", *ONNX))
    assert (code, err) == (0, ""), out
    assert same(weights(tmp_path / "b"), weights(tmp_path / "a"))
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert "All latencies were measured in one process, in alternation" in (tmp_path / "b/out/report.html").read_text()
