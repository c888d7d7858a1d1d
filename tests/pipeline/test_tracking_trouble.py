"""No account, no network, a tracker that dies: training goes on, and what was tracked is kept."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import wandb

from qatkit import QatkitError
from qatkit.errors import QatkitWarning
from qatkit.pipeline import runner
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.tracking import Tracking
from qatkit.pipeline.validation import validate_recipe
from qatkit.run.folder import Run
from tests.support.tracked import Records, recipe, run_files, trained
from tests.support.tracked import nobody as nobody


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("mode", ["", "online", "offline"])
def test_without_an_account_the_run_is_offline_whatever_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    tracking = Tracking(Run(recipe("wandb"), tmp_path))
    names = [type(logger).__name__ for logger in tracking.loggers("dense")]
    tracking.close()
    assert names == ["CSVLogger", "StageLogger"]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.usefixtures("nobody")
def test_a_run_that_the_user_has_open_stays_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = wandb.init(mode="offline", dir=tmp_path / "theirs", id="theirs")
    tracking = Tracking(Run(recipe("wandb"), tmp_path))
    (_, logger) = tracking.loggers("dense")
    logger.log_metrics({"loss": 1.0}, step=0)
    tracking.close()
    assert wandb.run is theirs
    theirs.finish()
    (own,) = run_files(tmp_path)
    assert [row["dense/loss"] for row in Records(own).history()] == [1.0]
    (other,) = run_files(tmp_path / "theirs")
    while b"theirs" not in other.read_bytes():  # W&B may write the file of a finished run a little later
        time.sleep(0.05)
    assert b"dense/loss" not in other.read_bytes()


@pytest.mark.usefixtures("nobody")
def test_disabled_means_csv_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking = Tracking(Run(recipe("wandb"), tmp_path))
    assert [type(logger).__name__ for logger in tracking.loggers("dense")] == ["CSVLogger"]
    assert not list(tmp_path.glob("wandb*"))


@pytest.mark.usefixtures("nobody")
def test_a_run_that_cannot_start_online_is_kept_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = wandb.init

    def unreachable(**options: Any) -> Any:
        if options["mode"] != "offline":
            raise wandb.errors.CommError("no route to host")
        return init(**options)

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", unreachable)
    tracking = Tracking(Run(recipe("wandb"), tmp_path))
    with pytest.warns(QatkitWarning, match=r"cannot start online \(CommError: no route to host\); .*wandb sync"):
        assert len(tracking.loggers("dense")) == 2
    tracking.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


@pytest.mark.usefixtures("nobody")
def test_training_goes_on_with_csv_where_wandb_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise wandb.errors.UsageError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_stages(Run(recipe("wandb"), tmp_path), until="ptq")
    said = [str(warning.message) for warning in caught if issubclass(warning.category, QatkitWarning)]
    assert len(said) == 1  # once, not once per stage
    assert re.match(r"trainer\.logger: W&B failed \(UsageError: no service\); the run continues", said[0])
    assert trained(tmp_path)


@pytest.mark.usefixtures("nobody")
def test_training_goes_on_where_wandb_dies_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", dead)
    with pytest.warns(QatkitWarning, match="ConnectionResetError: Connection lost") as caught:
        run_stages(Run(recipe("wandb"), tmp_path), until="ptq")
    assert len([warning for warning in caught if issubclass(warning.category, QatkitWarning)]) == 1
    assert trained(tmp_path)
    assert new_run_is_new(tmp_path)


@pytest.mark.usefixtures("nobody")
def test_a_stage_that_fails_leaves_no_run_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Run, name: str, stage_print: Any, tracking: Tracking, progress: Any) -> None:
        tracking.loggers(name)
        raise QatkitError("diverged")

    monkeypatch.setattr(runner, "run_stage", fails)
    with pytest.raises(QatkitError, match="diverged"):
        run_stages(Run(recipe("wandb"), tmp_path), until="ptq")
    assert new_run_is_new(tmp_path)


def new_run_is_new(folder: Path) -> bool:
    """Whether `wandb.init` starts a run of the user's, and does not return one that qatkit left open."""
    run = wandb.init(mode="offline", dir=folder / "user", id="user")
    run.finish()
    return run.id == "user"


@pytest.mark.parametrize("start", [validate_recipe, lambda recipe: run_stages(Run(recipe, Path("never")))])
def test_a_missing_tensorboard_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch, start: Any) -> None:
    from qatkit.pipeline import logger_check

    monkeypatch.setattr(logger_check, "find_spec", lambda name: None)
    with pytest.raises(QatkitError, match=r"^trainer.logger: 'tensorboard' needs .*`pip install tensorboard`"):
        start(recipe("tensorboard"))
    assert not Path("never").exists()
