"""Log a run's metrics to CSV files, and to TensorBoard or Weights & Biases if the recipe enables them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from qatkit.errors import QatkitWarning
from qatkit.pipeline.logger_check import check_logger
from qatkit.pipeline.wandb_run import (
    STEP,
    StageLogger,
    model_artifact,
    numbers_of,
    numbers_of_baseline,
    open_run,
    wandb_mode,
)
from qatkit.run.folder import Run


class Tracking:
    """The loggers of a run folder, which also receive the results of each finished stage and of the run.

    Args:
        run: The run; `trainer.logger` of its recipe selects the loggers.

    Example:
        >>> from qatkit.recipe.loading import load_recipe
        >>> from qatkit.run.folder import Run
        >>> tracking = Tracking(Run(load_recipe("vision/digits_int4"), Path("runs/mine")))
        >>> [type(logger).__name__ for logger in tracking.loggers("dense")]
        ['CSVLogger']
    """

    def __init__(self, run: Run) -> None:
        self.recipe = run.recipe
        self.out = run.out
        self._folder = run.folder
        self._run: Any = None
        self._lost = False

    def loggers(self, stage: str) -> list[Logger]:
        """Return the loggers of a stage, CSV first; only rank 0 writes."""
        check_logger(self.recipe.trainer)
        logs = self._folder(stage) / "logs"
        attempts = len(list(logs.glob("*"))) if logs.exists() else 0
        # a resumed stage writes next to the earlier attempts: CSVLogger would delete them
        loggers: list[Logger] = [CSVLogger(logs.parent, name="logs", version=f"attempt_{attempts}")]
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning sets it on the function
            return loggers
        if self.recipe.trainer.logger == "tensorboard":
            board = self._board(stage)
            board.experiment.add_text("recipe", f"```\n{json.dumps(asdict(self.recipe), indent=1)}\n```")
            loggers.append(board)
        elif self.recipe.trainer.logger == "wandb" and (run := self._opened()) is not None:
            loggers.append(StageLogger(run, stage, self._give_up))
        return loggers

    def log_stage(self, stage: str, metrics: Mapping[str, float], codes: Sequence[int], steps: int) -> None:
        """Log the metrics and codes of a finished stage.

        Args:
            stage: Name of the stage.
            metrics: Metrics by name, such as "test/accuracy".
            codes: Histogram of the stage's integer weights from the lowest to the highest code; empty if there are
                none.
            steps: Number of training steps.
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
        """Log the comparison, its numbers as the run's summary, the report and the exported files; then close.

        Args:
            content: The content of ``report.json``.
            pages: The files of the report.
            models: The exported files by name.
        """

        def send(run: Any) -> None:
            import wandb

            files = [*content["rows"], *content["others"]]
            rows = {row["file"]: numbers_of(row) for row in files}
            metric = content["rows"][0]["verification"]["metric"]
            rows |= {
                row["name"]: numbers_of_baseline(row, metric) for row in content["baselines"] if not row["failure"]
            }
            columns = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
            cells = [[stage, *(numbers.get(name) for name in columns)] for stage, numbers in rows.items()]
            run.log({"comparison": wandb.Table(columns=["stage", *columns], data=cells)})
            # one by one, so that "qat/test/accuracy" appears next to the curve of the same name
            for stage, numbers in rows.items():
                for name, value in numbers.items():
                    run.summary[f"{stage}/{name}"] = value
            report = wandb.Artifact(f"{content['name']}-report", type="report")
            for page in pages:
                report.add_file(str(page.resolve()), policy="immutable")
            run.log_artifact(report)
            for row in files:
                run.log_artifact(model_artifact(content, row, models[row["file"]]))

        self._guarded(send)
        self.close()

    def close(self) -> None:
        """Finish the W&B run if one is open; the next use resumes it."""
        self._guarded(lambda run: run.finish(), opens=False)
        self._run = None

    def _board(self, stage: str) -> TensorBoardLogger:
        # a folder per stage: TensorBoard draws the stages in one chart, and joins the attempts of a stage
        return TensorBoardLogger(self.out / "tensorboard", name="", version=stage, default_hp_metric=False)

    def _guarded(self, send: Callable[[Any], None], opens: bool = True) -> None:
        run = self._opened() if opens and self.recipe.trainer.logger == "wandb" else self._run
        if run is None:
            return
        try:
            send(run)
        except Exception as error:  # an error of the tracker must not end training
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._lost:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"trainer.logger: W&B failed ({reason[:300]}); the run continues, and the metrics are in "
                f"{self.out / 'stages'} and report.json",
                QatkitWarning,
                stacklevel=1,  # higher, it would count as Lightning's, whose warnings are silenced in training
            )
        run, self._lost, self._run = self._run, True, None
        if run is not None:
            with suppress(Exception):  # it may have no process to talk to any more
                run.finish()  # otherwise the user's next wandb.init in this process would return this run

    def _opened(self) -> Any:
        """The W&B run, opened on first use; None if W&B is disabled or has failed."""
        if self._run is None and not self._lost:
            try:
                mode = wandb_mode()
                if mode != "disabled":
                    self._run = open_run(self.recipe, self.out, mode)
            except Exception as error:  # an error of the tracker must not end training
                self._give_up(error)
        return self._run
