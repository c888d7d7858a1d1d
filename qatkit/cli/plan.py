"""`qatkit plan`, and the table of memory that `validate` and `run` print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qatkit.cli.arguments import Allow, Overrides, RecipeArgument
from qatkit.errors import QatkitError

if TYPE_CHECKING:
    from qatkit.recipe import Recipe


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and answer.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv_bits: Annotated[int, typer.Option(help="Bits of keys and values: 16 or 8.")] = 16,
    device: Annotated[
        list[float] | None, typer.Option(metavar="GB", help="Memory of a device; 24, 40, 80 and 141 by default.")
    ] = None,
    allow: Allow = None,
) -> None:
    """Predict memory without loading weights: of every stage's training, and of serving in several schemes.

    Example: qatkit plan llm/int4_qat --context 8192 --batch 16 --device 24
    """
    from qatkit.recipe.loading import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_training(loaded, allow or [], force=True)
    _print_serving(loaded, allow or [], context, batch, kv_bits, device or [24.0, 40.0, 80.0, 141.0])


def print_training(recipe: Recipe, allow: Sequence[str], force: bool, quiet: bool = False) -> None:
    """Print what every stage that trains takes on each device; refuse what does not fit unless `force`."""
    from qatkit.advise.fit import check_fit
    from qatkit.advise.plan import device_of, gigabytes, plan_recipe

    plans = plan_recipe(recipe, allow)
    found = device_of(recipe.trainer)
    if plans and not quiet:
        room = f", which has {gigabytes(found.memory)}" if found.memory is not None else ""
        typer.echo(f"predicted memory on each of {found.count} x {found.name}{room}:")
    for plan in plans if not quiet else ():
        memory = plan.memory
        parts = {
            "weights": memory.weights,
            "teacher": memory.teacher,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
        }
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        open_ = f", activations not predicted: {plan.unknown}" if plan.unknown else ""
        typer.echo(
            f"  {plan.stage}: {gigabytes(plan.on_each)} ({memory.trained:,} of {memory.parameters:,} parameters "
            f"trained; {listed}{open_})"
        )
    if not force:
        check_fit(recipe, plans, allow)


def _print_serving(
    recipe: Recipe, allow: Sequence[str], context: int, batch: int, kv_bits: int, devices: Sequence[float]
) -> None:
    from rich.console import Console
    from rich.table import Table

    from qatkit.advise.plan import gigabytes
    from qatkit.advise.serving import serving_memory
    from qatkit.run.architecture import meta_model

    for name, value in (("--context", context), ("--batch", batch)):
        if value < 1:
            raise QatkitError(f"{name}: {value} is out of range; write a whole number of at least 1")
    if kv_bits not in (8, 16):
        raise QatkitError(f"--kv-bits: {kv_bits} is out of range; write 16 or 8")
    found = serving_memory(meta_model(recipe.model, allow), context, batch, kv_bits)
    table = Table(title=f"serving {batch} x {context:,} tokens, keys and values in {kv_bits} bits")
    for header in ("scheme", "weights", "keys, values", "sum", *(f"{size:g} GB" for size in devices)):
        table.add_column(header)
    for row in found:
        fits = ["fits" if row.total <= size * 1e9 else "no" for size in devices]
        table.add_row(row.scheme, *map(gigabytes, (row.weights, row.cache, row.total)), *fits)
    Console(width=160).print(table)
    for size in devices:
        fitting = [row.scheme for row in found if row.total <= size * 1e9]
        typer.echo(f"{size:g} GB: {f'the first that fits is {fitting[0]}' if fitting else 'no scheme fits'}")
