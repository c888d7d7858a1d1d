"""`qatkit sensitivity`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, AllowWrite, AsJson, Out, Overrides, Quiet, RecipeArgument
from qatkit.cli.inputs import load, new_run, writing
from qatkit.cli.output import echo
from qatkit.errors import QatkitError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from qatkit.quantization.mixed.records import Sensitivity
    from qatkit.run.folder import Run
    from qatkit.schemes import Scheme
    from qatkit.tasks import Task

Candidates = Annotated[
    str,
    typer.Option(
        metavar="NAMES|FILE",
        help="Scheme names, such as W8A16,W4A16, or a YAML file with one NAME: {weight: {...}} block per format.",
    ),
]
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
    formats = _formats(candidates)
    from qatkit.pipeline.validation import validate_recipe

    validate_recipe(loaded, allow or [])
    from qatkit.quantization.folding import fold_batchnorm
    from qatkit.quantization.mixed.sensitivity import measure_sensitivity

    this = new_run(loaded, out, allow, allow_write)
    with writing(this, quiet or as_json):
        measured_stage = _stage(this, stage)
        model = this.load_model(measured_stage, quantizers=False)
        fold_batchnorm(model)  # as training does before it quantizes
        name = measured_stage or next(iter(loaded.stages))
        data, task = _batches(this, loaded.stages[name].batch_size, batches)
        with _counted(lambda model: _mean_loss(model, data, task), shown=sys.stderr.isatty() and not quiet) as loss:
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


def _formats(candidates: str) -> dict[str, Scheme]:
    """The candidate formats by name."""
    from qatkit.recipe import LayerConfig
    from qatkit.recipe.schema import read
    from qatkit.recipe.strict_yaml import parse_yaml
    from qatkit.schemes import scheme

    if not candidates.endswith((".yaml", ".yml", ".json")):
        return {name: scheme(name) for name in (part.strip() for part in candidates.split(","))}
    if not Path(candidates).is_file():
        raise QatkitError(
            f"the file '{candidates}' does not exist",
            key="--candidates",
            advice="pass an existing file, or names such as W8A16,W4A16",
        )
    content = parse_yaml(Path(candidates).read_text("utf-8-sig"), candidates)
    configs: dict[str, LayerConfig] = read(dict[str, LayerConfig], content, "candidates")
    return {name: config.specs for name, config in configs.items()}


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


def _batches(this: Run, batch_size: int, count: int) -> tuple[list[Any], Task | None]:
    """The first training batches, and the task that the data declares."""
    from qatkit.callbacks.batches import first_batches
    from qatkit.tasks import declared_task

    data = this.build_data(batch_size)
    data.prepare_data()
    data.setup("fit")
    return list(first_batches(data.train_dataloader(), count)), declared_task(data)


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


def _mean_loss(model: nn.Module, batches: Sequence[Any], task: Task | None) -> float:
    """Mean loss over all samples or tokens of the batches."""
    from qatkit.tasks import counted_loss

    losses = [counted_loss(model, batch, task) for batch in batches]
    return sum(float(loss) * int(count) for loss, count in losses) / max(sum(int(count) for _, count in losses), 1)
