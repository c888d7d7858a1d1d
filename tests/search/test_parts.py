"""The parts of a sweep: environments of processes, shared stages, locks that wait, and the file for W&B agents."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from qatkit.common.records import write_signed
from qatkit.errors import QatkitError
from qatkit.recipe.loading import load_recipe
from qatkit.run.folder import Run
from qatkit.run.lock import locked
from qatkit.run.sharing import SCHEMA, share_stages
from qatkit.search.execution import process_environment
from qatkit.search.grid import configurations, parse_grid
from tests.cli.in_process import qatkit
from tests.search.test_sweep import BITS, RECIPE


def test_processes_at_a_time_share_cpus_and_gpus_and_a_single_one_has_all() -> None:
    assert process_environment({"A": "1"}, 0, 1, 8, ["0", "1"]) == {"A": "1"}
    gpus = [process_environment({}, slot, 3, 8, ["4", "5", "6", "7"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert gpus == ["4,7", "5", "6"]
    gpus = [process_environment({}, slot, 3, 8, ["4", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert gpus == ["4", "5", "4"]
    assert process_environment({"OMP_NUM_THREADS": "3"}, 1, 4, 2, []) == {"OMP_NUM_THREADS": "3"}
    assert process_environment({}, 1, 4, 2, []) == {"OMP_NUM_THREADS": "1"}


def test_random_configurations_are_distinct_repeatable_and_from_the_grid() -> None:
    _, grid = parse_grid(["a=1,2,3", "b=x,y", "c=true,false"])
    every = configurations(grid, None, 0)
    chosen = configurations(grid, 7, seed=3)
    assert chosen == configurations(grid, 7, seed=3) != configurations(grid, 7, seed=4)
    assert all(each in every for each in chosen)
    assert len({str(each) for each in chosen}) == 7
    assert sorted(map(str, configurations(grid, 100, 0))) == sorted(map(str, every))


def test_a_reference_cannot_leave_the_folder_of_the_sweep(tmp_path: Path) -> None:
    recipe, out = load_recipe("vision/digits_int4"), tmp_path / "runs" / "1"
    share_stages(out, {"dense": "dense-0123456789abcdef"})
    run = Run(recipe, out)
    assert run.folder("dense") == tmp_path / "stages" / "dense-0123456789abcdef"
    assert run.folder("qat") == out / "stages" / "qat"
    write_signed(out / "stages.json", {"folders": {"dense": "../../elsewhere"}}, SCHEMA)
    with pytest.raises(QatkitError, match="is not the name of a shared stage"):
        Run(recipe, out)


def test_a_link_in_a_shared_stage_is_refused_like_one_in_the_run(tmp_path: Path) -> None:
    out = tmp_path / "sweep" / "runs" / "1"
    share_stages(out, {"dense": "dense-0123456789abcdef"})
    run = Run(load_recipe("vision/digits_int4"), out)
    run.folder("dense").mkdir(parents=True)
    (run.folder("dense") / "model").symlink_to(tmp_path)
    with pytest.raises(QatkitError, match="this link leads to"):
        run.check_writes()


def test_a_lock_that_waits_is_granted_when_the_holder_has_ended(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from qatkit.run.lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(QatkitError, match="has used this folder since"), locked(tmp_path):
        pass
    assert holder.stdin is not None
    timer = threading.Timer(0.3, holder.stdin.close)
    began = time.monotonic()
    timer.start()
    with locked(tmp_path, wait=True):
        assert time.monotonic() - began >= 0.25
    holder.wait()


def test_agents_of_wandb_run_each_configuration_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "swept.yaml").write_text(RECIPE)
    values = (f"{BITS}=2,4", "export.format=dense,onnx", "seed=3")
    done = qatkit("sweep", "swept.yaml", *values, "--wandb", "agents.yaml", cwd=tmp_path)
    assert (done.code, done.out) == (0, "start the sweep with: wandb sweep agents.yaml\n")
    config = yaml.safe_load((tmp_path / "agents.yaml").read_text())
    assert config["parameters"] == {BITS: {"values": [2, 4]}, "export.format": {"values": ["dense", "onnx"]}}
    # as the agent builds its command
    chosen = {"args": {BITS: {"value": 2}, "export.format": {"value": "onnx"}}}
    filled = create_sweep_command_args(chosen)
    command: list[str] = []
    for part in create_sweep_command(list(config["command"])):
        command += filled[part[2:-1]] if part.startswith("${") else [part]
    (tmp_path / "qatkit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "qatkit").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r2"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        "run", "swept.yaml", "seed=3", "trainer.logger=wandb", f"{BITS}=2", "export.format=onnx", "--out", "runs/s1/r2",
    ]  # fmt: skip
