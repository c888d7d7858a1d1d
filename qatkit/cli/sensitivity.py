"""`qatkit sensitivity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Out, Overrides, Quiet, RecipeArgument
from qatkit.cli.candidates import Candidates, read_candidates
from qatkit.cli.inputs import load, new_run, writing
from qatkit.cli.output import echo
from qatkit.errors import QatkitError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from qatkit.quantization.mixed.records import Sensitivity
    from qatkit.run.folder import Run

Globs = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Layers to measure. Repeatable.", show_default="all layers")
]
Excluded = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Layers to exclude. Repeatable.")]


def command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    candidates: Candidates = "W8A16,W4A16",
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE", help="The stage whose model is measured.", show_default="the last one before compression"
        ),
    ] = None,
    include: Globs = None,
    exclude: Excluded = None,
    batches: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Number of training batches on which the loss is measured.")
    ] = 16,
    out: Out = None,
    allow: Allow = None,
    allow_write: AllowWrite = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the loss increase when each layer is quantized on its own.

    The command writes sensitivity.json, sensitivity.md and sensitivity.svg to the run folder. `qatkit allocate` reads
    sensitivity.json.

    Example: qatkit sensitivity mine.yaml --candidates W8A16,W4A16 --out runs/mine
    """
    loaded = load(recipe, overrides)
    formats = read_candidates(candidates)
    from qatkit.pipeline.validation import validate_recipe

    validate_recipe(loaded, allow or [])
    from qatkit.quantization.folding import fold_batchnorm
    from qatkit.quantization.mixed.sensitivity import measure_sensitivity
    from qatkit.trials.sensitivity import training_loss

    this = new_run(loaded, out, allow, allow_write)
    with writing(this, quiet or as_json):
        measured_stage = _stage(this, stage)
        model = this.load_model(measured_stage, quantizers=False)
        fold_batchnorm(model)  # as training does before it quantizes
        name = measured_stage or next(iter(loaded.stages))
        plain = training_loss(this, loaded.stages[name].batch_size, batches)
        with _counted(plain, shown=sys.stderr.isatty() and not quiet) as loss:
            measured = measure_sensitivity(model, formats, loss, include or ["*"], exclude or [])
        missing = _write(this.out, measured)
    if as_json:
        echo(json.dumps(measured.to_plain()))
    elif not quiet:
        from qatkit.report.sensitivity import markdown

        echo(f"measured {f'stage {measured_stage}' if measured_stage else 'the untrained model'}")
        echo(markdown(measured).split("\n\n", 1)[1], nl=False)
        echo(f"sensitivity.svg is skipped: {missing}" if missing else f"figure: {this.out / 'sensitivity.svg'}")
        echo(f"to select formats, run: qatkit allocate {this.out} --average-bits ...")


def _write(out: Path, measured: Sensitivity) -> str | None:
    """Write the results; if packages for the figure are missing, return a message about them."""
    from qatkit.common.files import write_atomically
    from qatkit.report.page import missing_packages
    from qatkit.report.sensitivity import markdown, picture

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "sensitivity.json", json.dumps(measured.to_plain(), indent=1))
    write_atomically(out / "sensitivity.md", markdown(measured))
    missing = missing_packages()
    if missing is None:
        write_atomically(out / "sensitivity.svg", picture(measured))
    return missing


def _stage(this: Run, wanted: str | None) -> str | None:
    """The stage to measure: the requested one, or the last one before compression if it is finished."""
    from qatkit.run.fingerprint import changed_keys, stage_inputs

    stages = this.recipe.stages
    if wanted is not None and wanted not in stages:
        raise QatkitError(f"'{wanted}' is not a stage", key="--stage", advice=did_you_mean(wanted, stages))
    name = wanted or next((row for row in this.rows if not stages[row].compresses), None)
    if name is None:
        return None
    record = this.record(name) if wanted else this.find(name)
    if record is None:
        return None
    inputs = json.loads(json.dumps(stage_inputs(this.recipe, name)))  # through JSON, like the record
    if changes := changed_keys(record.inputs, inputs):
        raise QatkitError(
            f"stage '{name}' in {this.out} was trained with different values: {'; '.join(changes[:10])}",
            advice="pass the overrides that the stage was trained with, or use another --out",
        )
    return name


@contextmanager
def _counted(loss: Callable[[nn.Module], float], shown: bool) -> Iterator[Callable[[nn.Module], float]]:
    """The same loss function, with a status line on the terminal that counts its calls."""
    if not shown:
        yield loss
        return
    from rich.console import Console

    done = 0
    with Console(stderr=True).status("measuring") as line:

        def counted(model: nn.Module) -> float:
            nonlocal done
            done += 1
            line.update(f"measuring, pass {done} over the batches")
            return loss(model)

        yield counted
