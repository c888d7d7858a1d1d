"""One run in several formats: each is checked, written, verified and reported as its own row."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qatkit import QatkitError
from qatkit.cli.main import app
from qatkit.pipeline.report import report_run
from qatkit.pipeline.validation import validate_recipe
from qatkit.recipe.loading import load_recipe, recipe_to_yaml
from qatkit.run.folder import Run

RECIPE = """\
name: both
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 5}
  qat: {max_steps: 4, quantize: {weight: {num_bits: 4}}}
export: [{format: dense}, {format: sparse}]
"""
ALLOW = ("--allow", "tests")


def words(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments, *ALLOW])
    return result.exit_code, " ".join(result.output.split())


def verified(out: Path) -> dict[str, Any]:
    checked: dict[str, Any] = json.loads(CliRunner().invoke(app, ["verify", str(out), "--json", *ALLOW]).output)
    return checked


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("both")
    (folder / "both.yaml").write_text(RECIPE)
    code, output = words("run", str(folder / "both.yaml"), "--out", str(folder / "run"), "--quiet")
    assert code == 0, output
    return folder / "run"


def test_each_format_has_its_own_folder_and_row(out: Path) -> None:
    files = sorted(str(path.relative_to(out / "export")) for path in (out / "export" / "qat").rglob("*"))
    assert files == [
        "qat/dense",
        "qat/dense/README.md",
        "qat/dense/model.safetensors",
        "qat/dense/verification.json",
        "qat/sparse",
        "qat/sparse/README.md",
        "qat/sparse/model.sparse.safetensors",
        "qat/sparse/verification.json",
    ]
    report = json.loads((out / "report.json").read_text())
    assert [row["file"] for row in report["rows"]] == ["dense", "qat"]
    assert [row["file"] for row in report["others"]] == ["dense/sparse", "qat/sparse"]
    assert {row["verification"]["format"] for row in report["others"]} == {"sparse"}
    for page in ("report.md", "report.html"):
        text = (out / page).read_text()
        assert "qat/sparse" in text
        assert "all 4 files" in text or page == "report.md"


def test_a_format_is_added_to_a_finished_run_and_then_belongs_to_it(out: Path) -> None:
    code, output = words("export", str(out), "--format", "onnx")
    assert code == 0, output
    assert "qat/onnx: passed: all" in output
    assert f"{out}/export/qat/onnx/model.onnx (" in output.replace(" ", "").replace("(", " (")
    checked = verified(out)
    stages = ("dense", "qat")
    assert list(checked) == [f"{stage}{end}" for end in ("", "/sparse", "/onnx") for stage in stages]
    assert all(check["passed"] for check in checked.values())
    report_run(Run(load_recipe(out / "recipe.yaml"), out, ["tests"]))
    table = (out / "report.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| qat/onnx |"))
    assert row.count(" ms") == 2, row  # its latency is measured, which the main format's is not
    assert "| qat | trained w4a32 |" in table


@pytest.mark.slow
def test_bench_measures_the_formats_that_have_a_latency(out: Path) -> None:
    assert words("export", str(out), "--format", "onnx")[0] == 0
    result = CliRunner().invoke(app, ["bench", str(out), "--batch", "1", "--json", *ALLOW])
    assert list(json.loads(result.output)["files"]) == ["dense/onnx", "qat/onnx"]


def test_the_files_of_a_changed_format_fail_alone(out: Path) -> None:
    path = out / "export" / "qat" / "sparse" / "model.sparse.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\x01\x02\x03\x04")
    with pytest.warns(match="changed after it was verified"):
        checked = verified(out)
    assert [name for name, check in checked.items() if not check["passed"]] == ["qat/sparse"]
    path.write_bytes(content)
    with pytest.warns(match="changed after it was verified"):
        assert words("verify", str(out))[0] == 0


def test_a_format_that_does_not_fit_is_refused_with_its_own_reason_and_writes_nothing(out: Path) -> None:
    code, output = words("export", str(out), "--format", "compressed_tensors")
    assert code == 2
    assert "--format: stage 'dense': 'compressed_tensors' is supported only for transformers models" in output
    assert not list(out.glob("export/*/compressed_tensors"))
    code, output = words("export", str(out), "--format", "oonx")
    assert code == 2
    assert "--format: unknown export format 'oonx'; did you mean 'onnx'?" in output


def test_a_failed_export_leaves_no_folder_and_the_run_can_still_be_verified_and_reported(
    out: Path, tmp_path: Path
) -> None:
    copied, in_the_way = tmp_path / "run", tmp_path / "run" / "export" / "qat" / "onnx"
    shutil.copytree(out, copied)
    for stage in ("dense", "qat"):
        shutil.rmtree(copied / "export" / stage / "onnx", ignore_errors=True)
    in_the_way.touch()
    assert words("export", str(copied), "--format", "onnx")[0] != 0
    assert not (copied / "export" / "dense" / "onnx").exists()
    in_the_way.unlink()
    for folder in ("dense/onnx", "qat/onnx"):  # as older versions left them
        (copied / "export" / folder).mkdir()
    assert list(verified(copied)) == ["dense", "qat", "dense/sparse", "qat/sparse"]
    code, output = words("report", str(copied))
    assert code == 0, output


def test_an_interpreter_that_nothing_uses_is_refused_before_anything_is_written(out: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (out / "export").rglob("*")}
    for command, message in (
        (("verify",), "--python: 'dense' and 'sparse'"),
        (("export", "--format", "sparse"), "--python: 'sparse' files run in the environment of qatkit, so an inter"),
        (("export",), "--python: has no effect without --format, because nothing is verified; pass --format"),
        (("export", "--format", "mlx"), f"--python: '{out}' is not a file; pass the interpreter of an environment"),
    ):
        python = str(out) if "mlx" in command else sys.executable
        code, output = words(*command, str(out), "--python", python)
        assert code == 2, output
        assert message in output
    assert files == {path: path.stat().st_mtime_ns for path in (out / "export").rglob("*")}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", r"export: is empty; use \[\{format: onnx\}\], or remove the key"),
        ("[{format: onnx}, {format: onnx}]", r"export\[1\]\.format: 'onnx' is also in export\[0\], and both"),
        ("[{format: onnx}, {format: onx}]", r"export\[1\]\.format: unknown export format 'onx'; did you mean"),
        ("[{formt: onnx}]", r"export\[0\]\.formt: unknown key; did you mean 'format'"),
        ("onnx", r"export: 'onnx' is not a block of keys; use export: \{key: value\}"),
    ],
)
def test_a_wrong_list_is_named_by_its_key(value: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        load_recipe("vision/digits_int4", [f"export={value}"])


def test_every_format_is_checked_before_training() -> None:
    recipe = load_recipe("vision/digits_int4", ["export=[{format: onnx}, {format: compressed_tensors}]"])
    with pytest.raises(QatkitError, match=r"export\[1\]\.format: stage 'dense': 'compressed_tensors' is supported"):
        validate_recipe(recipe, [])


def test_a_list_is_kept_in_the_saved_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("vision/digits_int4", ["export=[{format: dense}, {format: sparse}]"])
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert list(recipe.exports) == ["export[0]", "export[1]"]


def test_one_format_of_a_list_must_be_that_of_the_target() -> None:
    target = "stages.qat.quantize={target: onnxruntime}"
    validate_recipe(load_recipe("vision/digits_int4", [target, "export=[{format: dense}, {format: onnx}]"]), [])
    recipe = load_recipe("vision/digits_int4", [target, "export=[{format: dense}, {format: sparse}]"])
    with pytest.raises(QatkitError, match=r"export\[0\]\.format: 'dense' is not the format of target 'onnxruntime'"):
        validate_recipe(recipe, [])
