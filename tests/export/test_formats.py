"""The table of export formats: a new format needs one row, and every exported path has one format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from qatkit import QatkitError
from qatkit.cli.main import app
from qatkit.export.dense import export_dense
from qatkit.export.format_row import ExportFormat
from qatkit.export.formats import FORMATS, format_of_path
from qatkit.export.sparse import export_sparse
from qatkit.export.verification import verify
from qatkit.recipe.loading import load_recipe

TOY = ExportFormat(
    name="toy",
    description="a pickled state dict",
    file_name="model.toy",
    check="tests.export.toy_format:check",
    write="tests.export.toy_format:write",
    read_back="tests.export.toy_format:read_back",
    bound="tests.export.toy_format:bound",
    runtime="The toy runtime",
    weights="toy weights",
)
SHORT = ["stages.dense.max_steps=5", "stages.qat.max_steps=5", "model.args.channels=[8,8]", "export.format=toy"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a row to the table, and nothing else anywhere."""
    monkeypatch.setitem(FORMATS._rows, "toy", TOY)


@pytest.mark.usefixtures("toy")
def test_a_format_of_one_row_is_validated_exported_verified_and_reported(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["run", "vision/digits_int4", *SHORT, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "export" / "qat" / "toy" / "model.toy").is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    check = report["rows"][-1]["verification"]
    assert (report["format"], check["format"], check["passed"], check["allowed_error"]) == ("toy", "toy", True, 1e-6)
    assert report["rows"][-1]["bytes"] == (tmp_path / "export" / "qat" / "toy" / "model.toy").stat().st_size
    assert "a toy bound" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "The toy runtime computes what training computed." in page
    assert "toy weights in" in page


@pytest.mark.usefixtures("toy")
def test_its_limits_are_asked_before_training() -> None:
    eight_bits = "stages.qat.quantize.weight.num_bits=8"
    result = CliRunner().invoke(app, ["validate", "vision/digits_int4", *SHORT, eight_bits])
    assert result.exit_code == 2
    said = "export.format: stage 'qat': layer 'conv1': toy files hold at most 4 bits; set num_bits: 4"
    assert said in " ".join(result.output.split())


@pytest.mark.usefixtures("toy")
def test_the_error_for_an_unknown_name_lists_it() -> None:
    with pytest.raises(QatkitError, match=r"export\.format: unknown export format 'tox'; did you mean 'toy'\?"):
        load_recipe("vision/digits_int4", ["export.format=tox"])
    with pytest.raises(QatkitError, match=r"use one of onnx, .*, mlx, gptq, awq, \.\.\."):
        load_recipe("vision/digits_int4", ["export.format=zzzz"])


def test_dense_and_sparse_files_are_told_apart_by_their_content(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    model.weight.data[:, 8:] = 0
    export_dense(model, tmp_path / "a.safetensors")
    export_sparse(model, tmp_path / "b.safetensors")
    assert format_of_path(tmp_path / "a.safetensors").name == "dense"
    assert format_of_path(tmp_path / "b.safetensors").name == "sparse"
    batches = [(torch.rand(4, 64), torch.zeros(4).long())]
    assert verify(model, tmp_path / "b.safetensors", batches).format == "sparse"


def test_a_path_that_fits_two_formats_needs_the_name_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS._rows, "toy", replace(TOY, file_name="model.onnx"))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(QatkitError, match=r"several export formats match; pass format=: one of 'onnx', 'toy'"):
        format_of_path(tmp_path / "model.onnx")
    assert format_of_path(tmp_path / "model.onnx", "toy").name == "toy"


def test_a_folder_of_no_format_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match="the content matches no export format"):
        format_of_path(tmp_path)
    with pytest.raises(QatkitError, match=r"format: unknown export format 'onix'; did you mean 'onnx'\?"):
        format_of_path(tmp_path, "onix")


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    row = replace(TOY, packages=("torch", "no_such_package"), extra="toys")
    with pytest.raises(QatkitError, match=r"'toy' needs no_such_package, .*; run: pip install 'qatkit\[toys\]'"):
        row.check_packages()


def test_every_row_names_functions_that_exist() -> None:
    from qatkit.common.tables import implementation

    for row in FORMATS.values():
        parts = ("check", "write", "read_back", "bound", "recognizes", "benchmark", "kernels", "dense_bytes")
        for part in parts:
            if name := getattr(row, part):
                assert callable(implementation(name)), f"{row.name}.{part}"
