"""The commands of mixed precision: measure what each format does to each layer, then choose formats under a budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, AsJson, Overrides, Quiet, RecipeArgument
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from torch import nn

    from qatkit.quantization.mixed.allocation import Sensitivity
    from qatkit.run.folder import Run
    from qatkit.schemes import Scheme

Candidates = Annotated[
    str,
    typer.Option(
        metavar="NAMES|FILE",
        help="Names of schemes such as W8A16,W4A16; or a YAML file with a block for each: NAME: {weight: {...}}.",
    ),
]
Globs = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Layers to measure; all by default.")]
Excluded = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Layers that stay unquantized.")]
MeasuredArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER_OR_JSON", help="What `qatkit sensitivity` wrote, or the folder it is in.")
]


def sensitivity(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    candidates: Candidates = "W8A16,W4A16",
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Whose result is measured; the last before compression.")
    ] = None,
    include: Globs = None,
    exclude: Excluded = None,
    batches: Annotated[int, typer.Option(min=1, help="Training batches that the loss is measured on.")] = 16,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much the loss grows when each layer alone is quantized; writes sensitivity.json, .md and .svg.

    Example: qatkit sensitivity mine.yaml --candidates W8A16,W4A16 --out runs/mine
    """
    from qatkit.pipeline.validation import validate_recipe
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    formats = _candidates(candidates)
    validate_recipe(loaded, allow or [])
    from qatkit.common.files import write_atomically
    from qatkit.quantization.folding import fold_batchnorm
    from qatkit.quantization.mixed.sensitivity import measure_sensitivity
    from qatkit.run.folder import Run

    this = Run(loaded, out or Path("runs") / loaded.name, allow or [])
    found = _stage(this, stage)
    model = this.load_model(found, quantizers=False)
    fold_batchnorm(model)  # as training does it before it quantizes
    name = found or next(iter(loaded.stages))
    data = _batches(this, loaded.stages[name].batch_size, batches)
    try:
        with _counted(lambda model: _mean_loss(model, data), shown=sys.stderr.isatty() and not quiet) as loss:
            measured = measure_sensitivity(model, formats, loss, include or ["*"], exclude or [])
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(130) from None
    this.out.mkdir(parents=True, exist_ok=True)
    from qatkit.report.page import missing_packages
    from qatkit.report.sensitivity import markdown, picture

    write_atomically(this.out / "sensitivity.json", json.dumps(measured.to_plain(), indent=1))
    write_atomically(this.out / "sensitivity.md", markdown(measured))
    if (missing := missing_packages()) is None:
        write_atomically(this.out / "sensitivity.svg", picture(measured))
    if as_json:
        typer.echo(json.dumps(measured.to_plain()))
    elif not quiet:
        typer.echo(f"measured {f'stage {found}' if found else 'the model as its factory makes it'}")
        typer.echo(markdown(measured).split("\n\n", 1)[1], nl=False)
        typer.echo(f"no sensitivity.svg: {missing}" if missing else f"picture: {this.out / 'sensitivity.svg'}")
        typer.echo(f"choose formats: qatkit allocate {this.out} --average-bits ...")


def allocate(
    measured: MeasuredArgument,
    average_bits: Annotated[
        float | None, typer.Option(help="Bits per weight that all layers may take on average, scales included.")
    ] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Or bytes, scales and zero points included.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose a format for each layer, so that the loss grows least under a budget; prints a block for a recipe.

    Example: qatkit allocate runs/mine --average-bits 4.5
    """
    from qatkit.quantization.mixed.allocation import allocate, allocated_layers, plain_layers, totals

    found = _read(measured)
    if (average_bits is None) == (size is None):
        raise QatkitError("--average-bits or --bytes: write one of them, such as --average-bits 4.5")
    chosen = allocate(found, budget_bytes=size, average_bits=average_bits)
    taken, increase = totals(found, chosen)
    bits = 8 * taken / found.weights
    layers = plain_layers(allocated_layers(found, chosen))
    if as_json:
        content = {"bytes": taken, "average_bits": bits, "loss": found.loss, "increase": increase, "layers": layers}
        typer.echo(json.dumps(content))
        return
    typer.echo(f"# {taken:,} bytes, {bits:.3f} bits per weight with scales")
    typer.echo(f"# loss {found.loss:.6g} + {increase:.4g}, if the increases of single layers add up")
    typer.echo("quantize:\n  layers:")
    for glob, how in layers.items():
        typer.echo(f"    {json.dumps(glob)}: {_flow(how)}")


def _flow(value: object) -> str:
    """Specs on one line of YAML: every text in them is a plain word."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _candidates(text: str) -> dict[str, Scheme]:
    from qatkit.recipe import LayerConfig
    from qatkit.recipe.schema import read
    from qatkit.recipe.strict_yaml import parse_yaml
    from qatkit.schemes import scheme

    if not text.endswith((".yaml", ".yml", ".json")):
        return {name: scheme(name) for name in (part.strip() for part in text.split(","))}
    if not Path(text).is_file():
        raise QatkitError(f"--candidates: '{text}' is no file; write its path, or names such as W8A16,W4A16")
    content = parse_yaml(Path(text).read_text("utf-8-sig"), text)
    configs: dict[str, LayerConfig] = read(dict[str, LayerConfig], content, "candidates")
    return {name: config.how for name, config in configs.items()}


def _stage(this: Run, wanted: str | None) -> str | None:
    """The stage to measure: the one that is named, else the last before compression where it is finished."""
    from qatkit.run.fingerprint import changed_keys, stage_inputs

    stages = this.recipe.stages
    if wanted is not None and wanted not in stages:
        raise QatkitError(f"--stage: '{wanted}' is no stage; write one of {list(stages)}")
    name = wanted or next((row for row in this.rows if not stages[row].compresses), None)
    if name is None:
        return None
    record = this.record(name) if wanted else this.find(name)
    if record is None:
        return None
    inputs = json.loads(json.dumps(stage_inputs(this.recipe, name)))  # through JSON, as the record went
    if changes := changed_keys(record.inputs, inputs):
        raise QatkitError(
            f"stage '{name}' in {this.out} was finished with other values: {'; '.join(changes[:10])}; write the "
            "overrides that it was run with, or another --out"
        )
    return name


def _batches(this: Run, batch_size: int, count: int) -> list[Any]:
    from qatkit.callbacks.batches import first_batches

    data = this.build_data(batch_size)
    data.prepare_data()
    data.setup("fit")
    return list(first_batches(data.train_dataloader(), count))


@contextmanager
def _counted(loss: Callable[[nn.Module], float], shown: bool) -> Iterator[Callable[[nn.Module], float]]:
    """The same loss; a line on the terminal says how often it was measured."""
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


def _mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Mean cross-entropy over every sample, or every token, of the batches once."""
    from qatkit.tasks import answers, call, token_loss

    losses = [token_loss(*answers(call(model, batch), batch)) for batch in batches]
    return sum(float(loss) * int(count) for loss, count in losses) / max(sum(int(count) for _, count in losses), 1)


def _read(path: Path) -> Sensitivity:
    from qatkit.quantization.mixed.allocation import Sensitivity

    file = path / "sensitivity.json" if path.is_dir() else path
    if not file.is_file():
        raise QatkitError(f"{file}: no measurement is here; write the --out folder of `qatkit sensitivity`")
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise QatkitError(f"{file}: is no JSON; measure again with `qatkit sensitivity`") from None
    return Sensitivity.from_plain(content)
