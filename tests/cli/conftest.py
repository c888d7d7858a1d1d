"""A finished run with a teacher cache, made once, and a copy of it for a test that changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.in_process import qatkit

RECIPE = """\
name: finished
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "tests.pipeline.test_early_stopping:few"}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 5}
  qat: {max_steps: 4, distill: {cache: {top_k: 3}}, quantize: {weight: {num_bits: 4}}}
export: {format: dense}
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``recipe.yaml`` and its finished run ``run``."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE)
    done = qatkit("run", "recipe.yaml", "--out", "run", "--allow", "tests", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder `finished`."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"
