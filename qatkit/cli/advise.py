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

    from qatkit.advise.advice import Plan, Situation
    from qatkit.advise.phases import Phases
    from qatkit.recipe import Recipe

_CONTEXT = 4096
_DATA_CONTEXT = 512
"""Longest training samples of the recipe for a config."""


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
        int | None, typer.Option(min=1, help="Tokens per sequence of a language model.", show_default="4096")
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
    from qatkit.advise.advice import Situation, dense_memory, dense_time, plans_for
    from qatkit.advise.devices import DEVICES
    from qatkit.advise.options import RUNTIMES
    from qatkit.common.units import format_bytes
    from qatkit.errors import did_you_mean

    if out.exists():
        raise QatkitError("the file exists", key=str(out), advice="pass another --out, or delete the file")
    chosen = DEVICES.row(device, "--device")
    if runtime is not None and runtime not in RUNTIMES:
        raise QatkitError(f"unknown runtime '{runtime}'", key="--runtime", advice=did_you_mean(runtime, RUNTIMES))
    base, built, phases = _model(model, overrides or [], batch, context, allow or [])
    limit = 0.9 * chosen.memory if memory is None else memory
    situation = Situation(built, phases, chosen, limit, context or _CONTEXT, batch, max_loss, training, runtime)
    plans = plans_for(situation)
    call = "token" if situation.language else "call"
    echo(
        f"without compression: {format_bytes(round(dense_memory(situation)))} of {limit:g} GB, at least "
        f"{_time(dense_time(situation))} per {call} on {chosen.name}"
    )
    print_table(_table(plans, situation, call, price))
    for index, plan in enumerate(plans, start=1):
        for row in plan.evidence:
            echo(f"plan {index}: {row.method} of {row.format} in {row.benchmark}: {row.shown}")
        if plan.training_memory:
            need = f"{format_bytes(round(plan.training_memory))} per copy of the model without activations"
            echo(f"plan {index}: training needs about {need}")
    written = _write(base, plans, situation, out, allow or [])
    echo(f"recipe of plan {written + 1}: {out}")


def _model(
    what: str, overrides: Sequence[str], batch: int, context: int | None, allow: Sequence[str]
) -> tuple[Recipe | Path, nn.Module, Phases]:
    """The recipe or the folder, the model on the meta device, and the costs of its layers."""
    from qatkit.advise.phases import is_language_model, language_phases, model_of_config

    folder = Path(what)
    if folder.is_dir():
        if overrides:
            raise QatkitError(
                "a config has no recipe keys to override", key=overrides[0], advice="edit the config, or pass a recipe"
            )
        model = model_of_config(folder)
        return folder, model, language_phases(model, batch, context or _CONTEXT)
    from qatkit.pipeline.profiling import forward_of
    from qatkit.run.architecture import meta_model

    recipe = load(what, list(overrides))
    model = meta_model(recipe.model, allow).eval()
    if is_language_model(model):
        return recipe, model, language_phases(model, batch, context or _CONTEXT)
    if context is not None:
        raise QatkitError("the model is not a language model", key="--context", advice="remove the option")
    return recipe, model, forward_of(recipe, model, batch, allow)


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
    from qatkit.common.files import write_atomically

    failure: QatkitError | None = None
    for index, plan in enumerate(plans):
        write_atomically(out, _recipe(base, plan, situation))
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


def _recipe(base: Recipe | Path, plan: Plan, situation: Situation) -> str:
    from dataclasses import asdict
    from itertools import takewhile

    from qatkit.advise.advice import stages_of
    from qatkit.recipe.strict_yaml import dump_yaml

    head, layers = _head(situation)
    compression = stages_of(plan, head, layers)
    if isinstance(base, Path):
        context = min(situation.context, _DATA_CONTEXT)
        content: dict[str, Any] = {
            "name": base.resolve().name.replace(" ", "_"),
            "model": {"factory": "qatkit.models:causal_lm", "args": {"name_or_path": str(base)}},
            "data": {"factory": "qatkit.data:stdlib_text", "args": {"context": context}},
        }
        stages: dict[str, Any] = {"dense": {"max_steps": 0}}
        note, size = "# Replace data, which is the source code of Python's standard library, by your own.\n", 8
    else:
        kept = list(takewhile(lambda stage: not stage[1].compresses and stage[1].lora is None, base.stages.items()))
        content = {key: value for key, value in asdict(base).items() if key not in ("stages", "export", "evaluate")}
        stages = {name: asdict(stage) for name, stage in kept} or {"dense": {"max_steps": 0}}
        note, size = "", next(iter(base.stages.values())).batch_size
    stages |= {name: {**stage, "batch_size": size} for name, stage in compression.items()}
    content |= {"stages": stages, "export": {"format": plan.option.export}}
    return f"# {plan.name} for {situation.device.name}, proposed by qatkit advise.\n{note}{dump_yaml(content)}"


def _head(situation: Situation) -> tuple[str | None, int | None]:
    """The name of the output layer of a language model and its number of layers; None for other models."""
    if not situation.language:
        return None, None
    model: Any = situation.model
    output = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is output), None)
    return name, model.config.get_text_config().num_hidden_layers


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
