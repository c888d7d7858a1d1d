"""The Weights & Biases run of a run folder.

- A recipe is one W&B run. Metrics of a stage have its name as prefix, as in ``qat/train/loss``, and are plotted over
  the stage's own steps. With one step count for all stages, a change in the length of the first stage would shift all
  later curves, and a stage that is retrained on its own would have no known first step.
- qatkit generates the run's ID and writes it to ``RUN/wandb_run_id`` before W&B starts, so that an interrupted run
  resumes the same W&B run.
- There is no login prompt, and no data leaves the machine of a user who is not logged in. Without credentials, the run
  is offline and stored below ``RUN/wandb`` for a later ``wandb sync``. ``WANDB_MODE`` takes precedence.
- W&B errors never stop training. If W&B cannot start online, it starts offline. If it cannot start at all or fails
  later, qatkit prints one warning and continues with CSV files.
- There are no per-layer panels: each stage has one table with a row per layer, and one histogram of all its codes.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from qatkit.common.files import write_atomically
from qatkit.errors import QatkitWarning
from qatkit.recipe import Recipe
from qatkit.report.sentences import not_run_in

STEP = "trainer/global_step"
"""Lightning's name for the x-axis of every curve on W&B."""


def open_run(recipe: Recipe, out: Path, mode: str) -> Any:
    """Start or resume the W&B run of a run folder.

    Args:
        recipe: The resolved recipe, which becomes the run's config.
        out: The run's folder.
        mode: The result of `wandb_mode`.
    """
    import wandb

    out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "qatkit"),
        "name": recipe.name,
        "id": _run_id(out / "wandb_run_id"),
        "resume": "allow",
        "dir": str(out.resolve()),
        "reinit": "create_new",  # does not affect a run that the user has opened
        "settings": wandb.Settings(console="off"),  # W&B must not capture the terminal
    }
    try:
        run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]  # one of its literals
    except Exception as error:
        if mode == "offline":
            raise
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"trainer.logger: W&B cannot start online ({reason[:300]}); the run is stored offline; upload it later "
            "with "
            f"`wandb sync {out / 'wandb'}/offline-run-*`",
            QatkitWarning,
            stacklevel=1,  # higher, it would count as Lightning's, whose warnings are silenced in training
        )
        run = wandb.init(mode="offline", **options)
    # --force may have changed the recipe of a resumed run
    run.config.update(asdict(recipe), allow_val_change=True)  # type: ignore[no-untyped-call]
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


class StageLogger(WandbLogger):
    """Logs a stage to the W&B run with the stage's name as prefix; an error stops logging, not training."""

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


def wandb_mode() -> str:
    """Return the W&B mode: the user's setting, but never online without credentials."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return mode
    if wandb.run is not None:  # the user's own run: this one may send where it does, but login() then returns False
        return "offline" if wandb.run.offline else mode
    return mode if wandb.login(prompt=False, verify=False) else "offline"


def _run_id(path: Path) -> str:
    """The id in the file; generated and written if there is none."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        write_atomically(path, f"{(kept := uuid.uuid4().hex[:12])}\n")
    return kept


MEDIANS = ("first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s")
"""Quartiles that `qatkit bench` measures of language models."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers in a row of the report, by name."""
    return {
        "kind": row["kind"],
        **{f"test/{key.removeprefix('test_')}": value for key, value in row.items() if key.startswith("test_")},
        f"runtime/{row['verification']['metric']}": row["verification"]["runtime_metric"],
        "bytes": row["bytes"],
        **{f"latency_ms/batch_{point['batch_size']}": point["median_ms"] for point in row["latency"]},
        **{key: row["decoding"][key][1] for key in MEDIANS if row.get("decoding")},
        "parity": _parity(row),
    }


def numbers_of_baseline(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the numbers of a file that the runtime quantized without training, by name."""
    return {
        "kind": "post-training",
        f"runtime/{metric}": row["runtime_metric"],
        "bytes": row["bytes"],
        **{f"latency_ms/batch_{point['batch_size']}": point["median_ms"] for point in row["latency"]},
    }


def model_artifact(content: Mapping[str, Any], row: Mapping[str, Any], path: Path) -> Any:
    """Create an artifact from an exported file, with its verification as metadata."""
    import wandb

    metadata = {"stage": row["stage"], "format": row["format"], **numbers_of(row), **row["verification"]}
    artifact = wandb.Artifact(f"{content['name']}-{row['file'].replace('/', '-')}", type="model", metadata=metadata)
    # not copied: an offline run would otherwise store every model twice
    if path.is_dir():
        artifact.add_dir(str(path.resolve()), policy="immutable")
    else:
        artifact.add_file(str(path.resolve()), policy="immutable")
    return artifact


def _parity(row: Mapping[str, Any]) -> str:
    check = row["verification"]
    if not check["passed"]:
        return "failed"
    return f"passed ({not_run} did not run)" if (not_run := not_run_in(check)) else "passed"
