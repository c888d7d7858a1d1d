"""Where a run's numbers go: CSV files always, and TensorBoard or Weights & Biases where the recipe asks for them.

What one might decide otherwise:

- A recipe is one W&B run, and its stages are told apart by a prefix: ``qat/train/loss`` over the stage's own steps.
  With offsets instead, another length of the first stage would move every curve after it, and a stage that is trained
  again on its own would not know where it starts.
- The run's id is drawn here and kept in ``RUN/wandb_run_id``, written before W&B starts, so that a killed process finds
  it and continues the same W&B run.
- Nobody is asked anything and nothing leaves the machine of somebody who is not logged in: without credentials the run
  is offline, below ``RUN/wandb``, to be sent later with ``wandb sync``. ``WANDB_MODE`` decides where it is set.
- W&B never ends a training. Where it cannot start online it starts offline; where it cannot start at all, or dies, a
  warning says so once and the CSV files go on.
- Nothing is a panel per layer: each stage has one table with a row per layer, and one histogram over all its codes.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from qatkit.errors import QatkitError, QatkitWarning
from qatkit.recipe import Recipe, TrainerConfig

STEP = "trainer/global_step"  # Lightning's name for the x-axis of every curve on W&B


def check_logger(trainer: TrainerConfig) -> None:
    """Refuse a logger whose package is missing, before anything is trained.

    Raises:
        QatkitError: names the package and the command that installs it.
    """
    if trainer.logger != "csv" and find_spec(trainer.logger) is None:
        raise QatkitError(
            f"trainer.logger: '{trainer.logger}' needs a package that is not installed; "
            f"run `pip install {trainer.logger}`, or write csv"
        )


class Tracking:
    """The loggers of one run folder, and what is sent when a stage or the whole run is done.

    Args:
        recipe: The resolved recipe; its `trainer.logger` decides.
        out: The run's folder.

    Example:
        >>> from qatkit.recipe.loading import load_recipe
        >>> tracking = Tracking(load_recipe("vision/digits_int4"), Path("runs/mine"))
        >>> [type(logger).__name__ for logger in tracking.loggers("dense")]
        ['CSVLogger']
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self._run: Any = None
        self._lost = False

    def loggers(self, stage: str) -> list[Logger]:
        """The loggers of one stage, CSV first; processes besides the first write nothing."""
        check_logger(self.recipe.trainer)
        logs = self.out / "stages" / stage / "logs"
        attempts = len(list(logs.glob("*"))) if logs.exists() else 0
        # a resumed stage writes beside the earlier attempts: CSVLogger would delete them
        found: list[Logger] = [CSVLogger(logs.parent, name="logs", version=f"attempt_{attempts}")]
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning sets it on the function
            return found
        if self.recipe.trainer.logger == "tensorboard":
            board = self._board(stage)
            board.experiment.add_text("recipe", f"```\n{json.dumps(asdict(self.recipe), indent=1)}\n```")
            found.append(board)
        elif self.recipe.trainer.logger == "wandb" and (run := self._opened()) is not None:
            found.append(_StageLogger(run, stage, self._give_up))
        return found

    def log_stage(self, stage: str, metrics: Mapping[str, float], codes: Sequence[int], steps: int) -> None:
        """Send what was measured on a finished stage.

        Args:
            stage: Its name.
            metrics: By name, such as "test/accuracy".
            codes: A histogram of its integer weights from the lowest code to the highest; empty where it has none.
            steps: That it was trained for.
        """
        if self.recipe.trainer.logger == "tensorboard":
            board = self._board(stage)
            board.log_metrics(dict(metrics), steps)
            board.finalize("success")

        def send(run: Any) -> None:
            import wandb

            values: dict[str, Any] = {f"{stage}/{name}": value for name, value in metrics.items()}
            if codes:
                edges = [-1 + 2 * index / len(codes) for index in range(len(codes) + 1)]
                counts = list(codes), edges
                values[f"{stage}/codes"] = wandb.Histogram(np_histogram=counts)  # type: ignore[arg-type]  # no arrays
            run.log({**values, STEP: steps})

        self._guarded(send)

    def log_report(self, content: Mapping[str, Any], pages: Sequence[Path], models: Mapping[str, Path]) -> None:
        """Send the comparison, its numbers as the run's summary, the report and the exported files; then close.

        Args:
            content: What ``report.json`` holds.
            pages: The files of the report.
            models: The exported file of every stage in the comparison.
        """

        def send(run: Any) -> None:
            import wandb

            rows = {row["stage"]: _numbers(row) for row in content["rows"]}
            columns = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
            cells = [[stage, *(numbers.get(name) for name in columns)] for stage, numbers in rows.items()]
            run.log({"comparison": wandb.Table(columns=["stage", *columns], data=cells)})
            # one by one: the values of a name such as "qat/test/accuracy" belong beside those of its curve
            for stage, numbers in rows.items():
                for name, value in numbers.items():
                    run.summary[f"{stage}/{name}"] = value
            report = wandb.Artifact(f"{content['name']}-report", type="report")
            for page in pages:
                report.add_file(str(page.resolve()), policy="immutable")
            run.log_artifact(report)
            for row in content["rows"]:
                run.log_artifact(_model_artifact(content, row, models[row["stage"]]))

        self._guarded(send)
        self.close()

    def close(self) -> None:
        """Finish the W&B run, where one is open; the next use of it resumes it."""
        self._guarded(lambda run: run.finish(), opens=False)
        self._run = None

    def _board(self, stage: str) -> TensorBoardLogger:
        # a folder per stage: TensorBoard lays the stages' curves over each other, and joins the attempts of one
        return TensorBoardLogger(self.out / "tensorboard", name="", version=stage, default_hp_metric=False)

    def _guarded(self, send: Callable[[Any], None], opens: bool = True) -> None:
        run = self._opened() if opens and self.recipe.trainer.logger == "wandb" else self._run
        if run is None:
            return
        try:
            send(run)
        except Exception as error:  # a lost tracker is no reason to lose a training
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._lost:
            said = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"trainer.logger: W&B failed ({said[:300]}); the run goes on, and its numbers are in "
                f"{self.out / 'stages'} and report.json",
                QatkitWarning,
                stacklevel=1,  # higher, it would seem to be of Lightning, whose own warnings training silences
            )
        self._lost, self._run = True, None

    def _opened(self) -> Any:
        """The W&B run, started on first use; None where W&B is disabled or lost."""
        if self._run is None and not self._lost:
            try:
                mode = _mode()
                if mode != "disabled":
                    self._run = self._start(mode)
            except Exception as error:  # whatever W&B raises, training is worth more
                self._give_up(error)
        return self._run

    def _start(self, mode: str) -> Any:
        import wandb

        self.out.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "qatkit"),
            "name": self.recipe.name,
            "id": _run_id(self.out / "wandb_run_id"),
            "resume": "allow",
            "dir": str(self.out.resolve()),
            "reinit": "create_new",  # a run that the user has open stays theirs
            "settings": wandb.Settings(console="off"),  # the terminal belongs to whoever runs qatkit
        }
        try:
            run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]  # one of its literals
        except Exception as error:
            if mode == "offline":
                raise
            said = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"trainer.logger: W&B cannot start online ({said[:300]}); the run is kept offline, send it later with "
                f"`wandb sync {self.out / 'wandb'}/offline-run-*`",
                QatkitWarning,
                stacklevel=1,  # higher, it would seem to be of Lightning, whose own warnings training silences
            )
            run = wandb.init(mode="offline", **options)
        # --force may have changed the recipe of a run that is resumed
        run.config.update(asdict(self.recipe), allow_val_change=True)  # type: ignore[no-untyped-call]
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run


class _StageLogger(WandbLogger):
    """One stage's view of the W&B run: every name starts with the stage's, and an error costs the log, not the run."""

    LOGGER_JOIN_CHAR = "/"

    def __init__(self, run: Any, stage: str, give_up: Callable[[Exception], None]) -> None:
        super().__init__(experiment=run, prefix=stage)
        self._give_up = give_up
        self._working = True

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._working:
            try:
                super().log_metrics(metrics, step)
            except Exception as error:  # W&B's own process may die at any time
                self._working = False
                self._give_up(error)


def _mode() -> str:
    """How W&B is to run: as the user has set it, except that it is never online without credentials."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return mode
    if wandb.run is not None:  # the user's own: where it may send to, this one may, and login() answers no beside it
        return "offline" if wandb.run.offline else mode
    return mode if wandb.login(prompt=False, verify=False) else "offline"


def _run_id(path: Path) -> str:
    """The id that the file keeps; drawn and written where there is none."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        path.write_text(f"{(kept := uuid.uuid4().hex[:12])}\n")
    return kept


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the report as plain numbers, by name."""
    return {
        "kind": row["kind"],
        **{f"test/{key.removeprefix('test_')}": value for key, value in row.items() if key.startswith("test_")},
        f"runtime/{row['verification']['metric']}": row["verification"]["runtime_metric"],
        "bytes": row["bytes"],
        **{f"latency_ms/batch_{point['batch_size']}": point["median_ms"] for point in row["latency"]},
        "parity": _parity(row),
    }


def _model_artifact(content: Mapping[str, Any], row: Mapping[str, Any], path: Path) -> Any:
    """An exported file as an artifact, with what verification said of it."""
    import wandb

    metadata = {"stage": row["stage"], "format": content["format"], **_numbers(row), **row["verification"]}
    artifact = wandb.Artifact(f"{content['name']}-{row['stage']}", type="model", metadata=metadata)
    # not copied: offline runs would otherwise double every model in the user's home folder
    if path.is_dir():
        artifact.add_dir(str(path.resolve()), policy="immutable")
    else:
        artifact.add_file(str(path.resolve()), policy="immutable")
    return artifact


def _parity(row: Mapping[str, Any]) -> str:
    return "passed" if row["verification"]["passed"] else "failed"
