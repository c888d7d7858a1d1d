"""`qatkit environment` refuses what needs no environment, and leaves no folder after a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.in_process import qatkit


def test_a_format_without_an_environment_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    done = qatkit("environment", "onnx", "env", cwd=tmp_path)
    assert (done.code, done.err) == (
        2,
        "error: FORMAT: 'onnx' files run in the environment of qatkit; run: pip install 'qatkit[onnx]'\n",
    )
    assert "unknown export format 'mx'; did you mean 'mlx'?" in qatkit("environment", "mx", "env", cwd=tmp_path).err
    (tmp_path / "env").mkdir()
    assert qatkit("environment", "mlx", "env", cwd=tmp_path).err == "error: env: already exists; pass a new folder\n"


def test_a_failed_installation_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = qatkit("environment", "mlx", "env", cwd=tmp_path)
    assert done.code == 2
    assert "error: pip cannot install mlx==" in done.err
    assert not (tmp_path / "env").exists()
