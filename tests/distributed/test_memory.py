"""The predicted memory of each of two processes is the memory that torch allocates while Lightning trains."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from qatkit.advise.plan import plan_recipe
from qatkit.recipe.loading import load_recipe
from tests.distributed.memory_worker import CASES, overrides
from tests.support import warm
from tests.support.memory import RECIPE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    (folder / "recipe.yaml").write_text(RECIPE)
    worker = Path(__file__).parent / "memory_worker.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [warm.python(), str(worker), str(folder / "recipe.yaml"), str(folder)]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_each_of_two_processes_takes_what_was_predicted(case: str, folder: Path) -> None:
    plans = plan_recipe(load_recipe(folder / "recipe.yaml", overrides(case)))
    predicted = next(plan.on_each for plan in plans if plan.stage == CASES[case][0])
    for rank in (0, 1):
        found = json.loads((folder / f"{rank}.json").read_text())[case]
        assert abs(predicted / found - 1) < 0.15, f"{predicted} predicted, {found} measured: {predicted / found:.3f}"
