"""A file of a finished stage that is missing or has one other bit is named by every command that reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qatkit import QatkitError, QatkitWarning
from qatkit.pipeline.runner import run_stages
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.run.stage_files import check_logs

RECIPE = """
name: damaged
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu}
stages:
  only: {max_steps: 5, lora: {rank: 2}}
  rounded: {max_steps: 0, quantize: {weight: {num_bits: 4}}}
"""
FILES = {
    "only": ["model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
    "rounded": ["model/model.safetensors", "quantizers.safetensors"],
}
LOG = "logs/attempt_0/metrics.csv"
PAIRS = [(stage, file) for stage, files in FILES.items() for file in files]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "damaged.yaml").write_text(RECIPE)
    run = Run(load_recipe(folder / "damaged.yaml"), folder / "run", ["tests"])
    run_stages(run)
    return run


@pytest.fixture
def copied(done: Run, tmp_path: Path) -> Run:
    shutil.copytree(done.out, tmp_path / "run")
    return Run(done.recipe, tmp_path / "run", ["tests"])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_the_record_holds_a_digest_of_every_file(done: Run) -> None:
    assert {stage: sorted(done.record(stage).files) for stage in FILES} == {
        "only": sorted([*FILES["only"], LOG]),
        "rounded": sorted(FILES["rounded"]),
    }


@pytest.mark.parametrize(("stage", "file"), PAIRS)
def test_a_flipped_bit_is_refused_by_the_name_of_its_file_and_mended_with_force(
    stage: str, file: str, copied: Run
) -> None:
    path = copied.folder(stage) / file
    flip(path, path.stat().st_size // 2)
    with pytest.raises(
        QatkitError, match=r"has changed since stage .*; restore the file, or use `qatkit run --force`"
    ) as one:
        copied.load_model(stage)
    with pytest.raises(QatkitError) as two:
        run_stages(copied)
    assert str(path) in str(one.value)
    assert str(one.value) == str(two.value)
    assert run_stages(copied, force=True) == [stage]
    copied.load_model(stage)


@pytest.mark.parametrize(("stage", "file"), PAIRS)
def test_a_missing_file_is_named(stage: str, file: str, copied: Run) -> None:
    (copied.folder(stage) / file).unlink()
    with pytest.raises(QatkitError, match=rf"{file} is missing; restore the file"):
        copied.load_model(stage)


def test_a_changed_log_stops_only_the_report_and_a_missing_one_is_a_warning(copied: Run) -> None:
    folder, record = copied.folder("only"), copied.record("only")
    check_logs(folder, record)
    log = folder / LOG
    text = log.read_text()
    position = text.index("4,") if "4," in text else text.index(",")
    log.write_text(text[:position] + "9" + text[position + 1 :])
    with pytest.raises(QatkitError, match=rf"{LOG} has changed since stage 'only' .*delete it to omit its curves"):
        check_logs(folder, record)
    assert run_stages(copied) == []
    copied.load_model("only")
    log.unlink()
    with pytest.warns(QatkitWarning, match=f"{LOG} is missing, so the report lacks its curves"):
        check_logs(folder, record)


def test_no_flipped_bit_of_a_record_is_silent(copied: Run) -> None:
    path = copied.folder("rounded") / "stage.json"
    content = path.read_bytes()
    whole = json.loads(content)
    for position in range(0, len(content), 7):
        flip(path, position)
        try:
            copied.record("rounded")
            assert json.loads(path.read_bytes()) == whole  # a blank became another blank
        except QatkitError as error:
            assert str(path) in str(error)  # noqa: PT017  (an error is what most flips must give)
        path.write_bytes(content)
