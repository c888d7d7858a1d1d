"""Everything in README and docs runs: commands, Python, recipes, and the tables come from benchmark results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {"README.md", "own_model.md", "pruning.md"}  # pages run by `make test` too; `make demo` is that of first_run.md

EXTRAS = {  # pages about a package that is not in `constraints-oldest.txt`
    "coreml.md": "coremltools",
    "openvino_genai.md": "openvino_genai",
    "executorch.md": "executorch",
}


def params(pages: list[Path], *, short: bool) -> list[Any]:
    """The pages as test parameters; a page is skipped if its package is missing."""
    made = []
    for page in pages:
        marks = [pytest.mark.slow] if short and page.name not in SHORT else []
        if (package := EXTRAS.get(page.name)) is not None:
            marks.append(pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
        made.append(pytest.param(page, id=page.name, marks=marks))
    return made


# the reader's own module, teacher and data, which the Python of a page uses
PRELUDE = """
import copy, os
import torch
from torch import nn
from torch.nn import functional as F
from lightning.pytorch import LightningModule
from qatkit.data import digits

class MyModule(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    def forward(self, x):
        return self.model(x)
    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

my_module, my_data = MyModule(), digits()
teacher = copy.deepcopy(my_module)
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


NAMED = re.compile(r"# (\w+\.(?:py|yaml))\n")


def write_named_blocks(page: Path, folder: Path) -> None:
    """Write each block whose first line is a comment with a file's name to that file."""
    for block in [*blocks(page, "yaml"), *blocks(page, "python")]:
        if named := NAMED.match(block):
            (folder / named[1]).write_text(block)


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{warm.commands()}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "WANDB_SILENT": "true",
    }


@pytest.mark.parametrize("page", params(PAGES, short=True))
def test_every_command_of_the_page_works(page: Path, tmp_path: Path) -> None:
    # one shell for the whole page: later commands use the files of earlier ones and the recipes that the page shows
    write_named_blocks(page, tmp_path)
    commands = "".join(blocks(page, "bash"))
    if commands:
        subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment(), check=True)


@pytest.mark.parametrize("page", params(PAGES, short=False))
def test_every_recipe_of_the_page_is_valid(page: Path, tmp_path: Path) -> None:
    write_named_blocks(page, tmp_path)
    for recipe in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(recipe)
        command = [warm.qatkit(), "validate", "recipe.yaml", "--allow", "my_package"]
        subprocess.run(command, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(tmp_path)}, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_the_page_runs(page: Path, tmp_path: Path) -> None:
    code = "\n".join(block for block in blocks(page, "python") if not NAMED.match(block))
    if code:
        code = PRELUDE + code.replace("max_epochs=10", "max_epochs=1, logger=False, enable_checkpointing=False")
        subprocess.run([warm.python(), "-c", code], cwd=tmp_path, env=environment(), check=True)


def test_the_callbacks_work_in_an_interactive_session_as_in_a_notebook(tmp_path: Path) -> None:
    # no file and no main guard: Lightning takes the session for interactive, and spawning is impossible
    code = "\n".join(blocks(ROOT / "docs" / "own_trainer.md", "python"))
    code = PRELUDE + code.replace("max_epochs=10", "max_epochs=1, logger=False, enable_checkpointing=False")
    done = subprocess.run(
        [sys.executable, "-i"], input=code + "\n", cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "passed: all" in done.stdout


def test_the_tables_match_the_benchmark_results() -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=True)


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    script, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    for command in ("make demo", "make test"):
        assert command in readme
        assert re.search(rf"^{command}$", script, re.MULTILINE)


EXAMPLES = {
    "own_trainer.py": "passed: all",
    "resume_pruning.py": "qatkit's MagnitudePruning: 0.500 of the weights are zeros before the stop, 0.500 after",
}


def test_every_example_is_run_below() -> None:
    assert set(EXAMPLES) == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs_and_prints_its_point(example: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [warm.python(), str(ROOT / "examples" / example)],
        cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert EXAMPLES[example] in done.stdout
