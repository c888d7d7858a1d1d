"""A verdict is bound to the files that it judged: report refuses it once one of them has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file, save_file

from qatkit import QatkitError, QatkitWarning
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import export_and_verify, read_verification, verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.run.exports import exports_of
from qatkit.run.folder import Run
from qatkit.run.sharing import share_stages

SHORT = ["stages.dense.max_steps=5", "stages.qat.max_steps=5", "model.args.channels=[8,8]", "export.format=dense"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    made = Run(load_recipe("vision/digits_int4", SHORT), tmp_path_factory.mktemp("run"))
    run_stages(made)
    export_run(made)
    verify_run(made)
    return made


@pytest.mark.parametrize("changed", ["export/qat/dense/model.safetensors", "stages/qat/model/model.safetensors"])
def test_a_verdict_about_another_file_is_refused_by_that_files_name(changed: str, run: Run) -> None:
    assert read_verification(run, exports_of(run)[-1])["passed"]
    path = run.out / changed
    content = path.read_bytes()
    tensors = load_file(path)
    tensors["conv1.weight"].view(-1)[0] += 1
    save_file(tensors, path)
    with pytest.raises(QatkitError, match=rf"{changed}: the file has changed since verification; run `qatkit export"):
        read_verification(run, exports_of(run)[-1])
    path.write_bytes(content)
    assert read_verification(run, exports_of(run)[-1])["passed"]


def test_verify_names_a_file_that_changed_too_little_to_fail(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    copied = Run(run.recipe, out)
    path = out / "export" / "dense" / "dense" / "model.safetensors"
    verify_run(copied)  # nothing changed: nothing is said
    with path.open("r+b") as file:
        header = file.read(200).replace(b'"format"', b'"Format"')
        file.seek(0)
        file.write(header)
    with pytest.warns(QatkitWarning, match=r"dense/model\.safetensors: the file changed after it was verified"):
        verify_run(copied)
    export_run(copied)
    assert not (out / "export" / "dense" / "dense" / "verification.json").exists()
    verify_run(copied)  # an export is no surprise


def test_a_stage_without_a_verdict_and_a_damaged_verdict_are_refused(run: Run, tmp_path: Path) -> None:
    path = run.out / "export" / "dense" / "dense" / "verification.json"
    content = path.read_text()
    path.unlink()
    with pytest.raises(QatkitError, match="'dense' has not been verified; run `qatkit verify"):
        read_verification(run, exports_of(run)[0])
    path.write_text(content[:100])
    with pytest.raises(
        QatkitError, match=r"verification\.json is corrupt \(.*\); restore the file, or run `qatkit verify"
    ):
        read_verification(run, exports_of(run)[0])
    path.write_text(content)


def test_the_data_is_built_once_for_exporting_and_verifying_and_not_at_all_if_nothing_is_missing(
    run: Run, tmp_path: Path
) -> None:
    class Counting(Run):
        built = 0

        def build_data(self, batch_size: int) -> LightningDataModule:
            self.built += 1
            return super().build_data(batch_size)

    out = tmp_path / "runs" / "1"
    shutil.copytree(run.out, out)
    names = {stage: f"{stage}-0123456789abcdef" for stage in run.recipe.stages}
    share_stages(out, names)
    for stage, name in names.items():
        shutil.copytree(run.folder(stage), tmp_path / "stages" / name)
    shared = Counting(run.recipe, out)
    first = export_and_verify(shared)
    assert (shared.built, all(check.passed for check in first.values())) == (1, True)
    assert export_and_verify(shared) == first
    assert shared.built == 1


@pytest.mark.parametrize("step", [export_run, verify_run, report_run])
def test_a_recipe_that_was_edited_after_training_is_refused_by_its_key(step: Callable[[Run], object], run: Run) -> None:
    edited = load_recipe("vision/digits_int4", [*SHORT, "data.args.test_fraction=0.3"])
    with pytest.raises(
        QatkitError,
        match=r"recipe\.yaml: the file was changed after stage 'dense' .*:\s+data\.args\.test_fraction: was 0\.2, "
        r"is now 0\.3; rerun the same `qatkit run` command",
    ):
        step(Run(edited, run.out))
