"""The worked examples of CONTRIBUTING.md: one row and one function or file add an item that works everywhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n# (\S+\.py)(?:, in (\w+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)
RECIPE = """\
name: added
model: {factory: "qatkit.models:mlp", args: {in_features: 64, hidden: [16], num_classes: 10}}
data: {factory: "my_data:graded"}
trainer: {accelerator: cpu, devices: 1}
stages:
  dense: {max_steps: 4}
  pruned: {max_steps: 2, prune: {method: activation, sparsity: 0.5, calibration_batches: 1}}
  distilled: {max_steps: 2, distill: {loss: l1, alpha: 0.5, teacher: dense}}
  halved: {max_steps: 0, quantize: {weight: {num_bits: 4, observer: mse}, init: halved}}
  powers: {max_steps: 0, start: dense, quantize: {weight: {type: powers, num_bits: 3, observer: mse}}}
export: {format: npz}
"""
DATA = """\
from qatkit.data import digits

def graded(batch_size: int = 32, seed: int = 0):
    return digits(batch_size=batch_size, seed=seed)

graded.task = "grading"
"""


def insert_row(text: str, table: str, row: str) -> str:
    """Add a row at the end of the table's list."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == table:
                rows = node.value.args[1]
                lines = text.splitlines(keepends=True)
                assert rows.end_lineno is not None
                end = sum(map(len, lines[: rows.end_lineno - 1])) + (rows.end_col_offset or 0) - 1
                return f"{text[:end]}{row.rstrip()},\n{text[end:]}"
    raise AssertionError(f"no table {table}")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with every example applied."""
    folder = tmp_path_factory.mktemp("extended")
    for source, place in (("qatkit", "qatkit"), ("callbacks", "qatkit/callbacks"), ("recipes", "qatkit/recipes")):
        shutil.copytree(ROOT / source, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(blocks) == 14, "two blocks for each of seven kinds"
    for name, table, code in blocks:
        path = folder / name
        text = path.read_text() if path.exists() else ""
        path.write_text(insert_row(text, table, code) if table else f"{text}\n\n{code}")
    (folder / "my_data.py").write_text(DATA)
    (folder / "added.yaml").write_text(RECIPE)
    return folder


def qatkit(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qatkit.cli", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_command_is_a_file_and_a_row(extended: Path) -> None:
    assert "Print the description of a recipe." in qatkit(extended, "--help")
    assert "describe vision/digits_int4" in qatkit(extended, "describe", "--help")
    assert qatkit(extended, "describe", "vision/digits_int4").strip()


def test_one_of_each_kind_is_validated_run_verified_and_reported(extended: Path) -> None:
    qatkit(extended, "validate", "added.yaml", "--allow", "my_data")
    qatkit(extended, "run", "added.yaml", "--allow", "my_data", "--out", "run", "--quiet")
    report = json.loads((extended / "run" / "report.json").read_text())
    rows = {row["stage"]: row for row in report["rows"]}
    assert all(row["verification"]["passed"] for row in rows.values())
    assert (extended / "run" / "export" / "powers" / "npz" / "model.npz").exists()
    page = (extended / "run" / "report.html").read_text()
    assert "NumPy" in page
    assert "grade" in json.dumps(report) or "grade" in page
