"""`qatkit advise`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatkit.cli.arguments import Allow, Overrides
from qatkit.cli.inputs import load
from qatkit.cli.output import echo, print_table
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from torch import nn

    from qatkit.advise.advice import Plan
    from qatkit.advise.situation import Situation
    from qatkit.recipe import Recipe

_CONTEXT = 4096


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A recipe, or a folder with the config.json of a transformers model.")
    ],
    device: Annotated[str, typer.Option(help="The device: a name such as a100, l4, xeon-8480 or raspberry-pi-5.")],
    overrides: Overrides = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="GB", help="Memory for weights and KV cache.", show_default="90% of the device's"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per sequence of a language model, at most its number of positions.",
            show_default="4096",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples or sequences per call.")] = 1,
    max_loss: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="PERCENT", help="Largest increase of the perplexity, or loss of accuracy in points."
        ),
    ] = 1.0,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Whether the model may be trained.")
    ] = True,
    runtime: Annotated[
        str | None, typer.Option(help="vllm, llamacpp, onnxruntime or openvino.", show_default="by model and device")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of the device per hour.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe of the first plan.")] = Path("advised.yaml"),
    allow: Allow = None,
) -> None:
    """Propose compression plans for a model and a device, and write a recipe.

    Each plan has its predicted memory, least time and cost, and the nearest measured row of qatkit's own benchmarks as
    the evidence for its accuracy. Weights are not read.

    Example: qatkit advise llm/int4_qat --device rtx4090 --max-loss 1
    """
    from qatkit.advise.advice import advice_for
    from qatkit.advise.devices import DEVICES
    from qatkit.advise.options import RUNTIMES
    from qatkit.advise.phases import served_context
    from qatkit.advise.proposal import left_out
    from qatkit.advise.situation import Situation, phases_of
    from qatkit.common.units import format_bytes
    from qatkit.errors import did_you_mean

    if out.exists():
        raise QatkitError("the file exists", key=str(out), advice="pass another --out, or delete the file")
    chosen = DEVICES.row(device, "--device")
    if runtime is not None and runtime not in RUNTIMES:
        raise QatkitError(f"unknown runtime '{runtime}'", key="--runtime", advice=did_you_mean(runtime, RUNTIMES))
    base, built, inputs = _model(model, overrides or [], batch, context, allow or [])
    tokens, shortened = served_context(built, context or _CONTEXT)
    phases = phases_of(built, inputs, batch, tokens)
    limit = 0.9 * chosen.memory if memory is None else memory
    situation = Situation(built, phases, inputs, chosen, limit, tokens, batch, max_loss, training, runtime)
    advice = advice_for(situation)
    plans, call = advice.plans, "token" if situation.language else "call"
    echo(
        f"without compression: {format_bytes(round(situation.dense_memory()))} of {limit:g} GB, at least "
        f"{_time(situation.dense_time())} per {call} on {chosen.name}"
    )
    print_table(_table(plans, situation, call, price))
    if shortened and situation.language:
        echo(f"note: {shortened}")
    for note in advice.notes:
        echo(f"note: {note}")
    for index, plan in enumerate(plans, start=1):
        for row in plan.evidence:
            echo(f"plan {index}: {row.format}, {row.method}, in {row.benchmark}: {row.shown}")
        if plan.training_memory:
            need = f"{format_bytes(round(plan.training_memory))} per copy of the model without activations"
            echo(f"plan {index}: training needs about {need}")
    written = _write(base, plans, situation, out, allow or [])
    echo(f"recipe of plan {written + 1}: {out}")
    if not isinstance(base, Path) and (dropped := left_out(base)) is not None:
        echo(f"note: {dropped}")


def _model(
    what: str, overrides: Sequence[str], batch: int, context: int | None, allow: Sequence[str]
) -> tuple[Recipe | Path, nn.Module, Any]:
    """The recipe or the folder, the model on the meta device, and a batch; None for a language model."""
    from qatkit.advise.phases import is_language_model, model_of_config

    folder = Path(what)
    if folder.is_dir():
        if overrides:
            raise QatkitError(
                "a config has no recipe keys to override", key=overrides[0], advice="edit the config, or pass a recipe"
            )
        return folder, model_of_config(folder), None
    from qatkit.pipeline.profiling import meta_inputs
    from qatkit.run.architecture import meta_model

    recipe = load(what, list(overrides))
    model = meta_model(recipe.model, allow).eval()
    if is_language_model(model):
        return recipe, model, None
    if context is not None:
        raise QatkitError("the model is not a language model", key="--context", advice="remove the option")
    return recipe, model, meta_inputs(recipe, batch, allow)


def _table(plans: Sequence[Plan], situation: Situation, call: str, price: float | None) -> Any:
    from rich.table import Table

    from qatkit.advise.price import per_thousand
    from qatkit.common.units import format_bytes

    table = Table()
    cost = [] if price is None else [f"per 1,000 {call}s"]
    for header in ("", "plan", "runtime", "memory", f"time per {call}, at least", *cost, "expected loss"):
        table.add_column(header, overflow="fold")
    for index, plan in enumerate(plans, start=1):
        size = format_bytes(round(plan.memory)) + ("" if plan.fits else ", does not fit")
        loss = "not measured" if plan.loss is None else f"{plan.loss:.2f}%{'' if plan.meets else ', above the limit'}"
        spent = [] if price is None else [f"{per_thousand(price, plan.seconds, situation.batch):.3g}"]
        table.add_row(str(index), plan.name, plan.option.runtime, size, _time(plan.seconds), *spent, loss)
    return table


def _write(base: Recipe | Path, plans: Sequence[Plan], situation: Situation, out: Path, allow: Sequence[str]) -> int:
    """Write the recipe of the first plan that is valid for this model, and return its index."""
    from qatkit.advise.proposal import recipe_text
    from qatkit.common.files import write_atomically

    failure: QatkitError | None = None
    for index, plan in enumerate(plans):
        write_atomically(out, recipe_text(base, plan, situation))
        try:
            _check(base, out, allow)
        except QatkitError as error:
            out.unlink()
            failure = error
            echo(f"plan {index + 1} is not possible for this model: {error}", err=True)
            continue
        return index
    assert failure is not None
    raise failure


def _check(base: Recipe | Path, out: Path, allow: Sequence[str]) -> None:
    """Validate the recipe; if the folder of the model has no weights, with an empty file in their place."""
    from qatkit.pipeline.validation import validate_recipe
    from qatkit.recipe.loading import load_recipe

    if not isinstance(base, Path) or any(base.glob("*.safetensors")):
        validate_recipe(load_recipe(out), allow)
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        (Path(folder) / "model.safetensors").touch()
        validate_recipe(load_recipe(out, [f"model.args.name_or_path={folder}"]), allow)
    echo(f"note: {base} contains no weights; copy them there before you run the recipe")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
