"""The parts of a sweep: environments of processes, shared stages, locks that wait, and the file for W&B agents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from qatkit.common.records import write_signed
from qatkit.errors import QatkitError
from qatkit.recipe.loading import load_recipe
from qatkit.recipe.strict_yaml import parse_yaml
from qatkit.run.folder import Run
from qatkit.run.lock import locked
from qatkit.run.sharing import SCHEMA, share_stages
from qatkit.trials.agents import agent_sweep
from qatkit.trials.execution import OUTPUT, process_environment, run_trials
from qatkit.trials.grid import configurations, overrides, parse_grid
from qatkit.trials.sweep import Trial, open_sweep
from tests.cli.in_process import qatkit
from tests.trials.test_sweep import BITS, RECIPE


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


def test_values_that_python_considers_equal_are_different_configurations(tmp_path: Path) -> None:
    _, grid = parse_grid(["seed=1,true,1.0,.inf,-.inf,.nan,null"])
    found, base = configurations(grid, None, 0), load_recipe("vision/digits_int4")
    recipes = [load_recipe("vision/digits_int4", [f"seed={number}"]) for number in range(len(found))]
    for _ in range(2):  # the second time, all of them are known
        trials = open_sweep(tmp_path, base, found, recipes)
        assert [trial.run.recipe.seed for trial in trials] == list(range(len(found)))


def texts(grid: dict[str, list[Any]]) -> list[str]:
    return [text for configuration in configurations(grid, None, 0) for text in overrides(configuration)]


def test_every_value_is_read_back_from_its_text() -> None:
    arguments = ["a=1,true,1.0,.inf,null", 'b="0.5","null",lsq,[.inf,{c: null}]']
    _, grid = parse_grid(arguments)
    read = [parse_yaml(text.partition("=")[2], "") for key in grid for text in texts({key: grid[key]})]
    values = [value for values in grid.values() for value in values]
    assert [(type(value), value) for value in read] == [(type(value), value) for value in values]


def test_the_reason_of_a_failure_is_that_of_the_last_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "silent").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "silent"))
    (tmp_path / OUTPUT).write_text("error: the reason of an earlier attempt\n")
    trial = Trial(1, {}, Run(load_recipe("vision/digits_int4"), tmp_path))
    ends = run_trials([trial], 1, [], lambda trial: None, lambda trial, end: None)
    assert (ends[1].code, ends[1].message) == (7, "the process ended with code 7")


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
    done = qatkit("sweep", "swept.yaml", *values, "--wandb", "agents.yaml", "--allow", "tests", cwd=tmp_path)
    assert (done.code, done.out) == (0, "start the sweep with: wandb sweep agents.yaml\n")
    config = yaml.safe_load((tmp_path / "agents.yaml").read_text())
    assert config["parameters"] == {BITS: {"values": [2, 4]}, "export.format": {"values": ["dense", "onnx"]}}
    said = agent_runs(config["command"], {BITS: 2, "export.format": "onnx"}, tmp_path)
    assert said == [
        "run", "swept.yaml", "seed=3", "trainer.logger=wandb", "--allow", "tests", f"{BITS}=2", "export.format=onnx",
        "--out", "runs/s1/r2",
    ]  # fmt: skip
    again = qatkit("sweep", "swept.yaml", *values, "--wandb", "agents.yaml", cwd=tmp_path)
    assert (again.code, "agents.yaml: the file exists" in again.err) == (2, True)


def agent_runs(command: list[str], values: dict[str, Any], folder: Path) -> list[str]:
    """The arguments that qatkit receives from an agent of W&B, which builds its command in this way."""
    filled = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    parts: list[str] = []
    for part in create_sweep_command(list(command)):
        parts += filled[part[2:-1]] if part.startswith("${") else [part]
    (folder / "qatkit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "qatkit").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r2"}
    return subprocess.run(parts, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_agents_of_wandb_insert_every_value_as_it_was_typed(tmp_path: Path) -> None:
    """They insert ``str(value)``, so null would become the text None, and the text "0.5" the number."""
    _, grid = parse_grid(["a=null,true,1.0,.inf,1e-05,3", 'b="0.5",lsq,"null",[x,null]'])
    config = yaml.safe_load(agent_sweep("swept", "swept.yaml", [], grid, None))
    for key, values in grid.items():
        for value, sent in zip(values, config["parameters"][key]["values"], strict=True):
            through = json.loads(json.dumps(sent))
            (typed,) = (
                text for text in agent_runs(config["command"], {key: through}, tmp_path) if text[:2] == f"{key}="
            )
            read = parse_yaml(typed.partition("=")[2], "")
            assert (type(read), read) == (type(value), value)
