"""The table of commands. To add a command, add one line here and a file of the same name, which is imported on use."""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    name: str
    description: str
    """One sentence for `qatkit --help`, which is also the first line of the function's docstring."""
    implementation: str = ""
    """The function as ``module:function``; by default ``command`` in the file of this name."""

    def __post_init__(self) -> None:
        if not self.implementation:
            module = f"qatkit.cli.{self.name.replace('-', '_')}"
            object.__setattr__(self, "implementation", f"{module}:command")


COMMANDS = Table(
    "command",
    [
        Command("list", "List the built-in recipes."),
        Command("show", "Print a recipe."),
        Command("validate", "Check a recipe and predict its memory use, without data or training."),
        Command("plan", "Predict memory use for training and serving, without loading weights."),
        Command("run", "Train, export, verify, measure and report."),
        Command("cache-teacher", "Compute and store a recipe's teacher outputs."),
        Command("export", "Export a run's finished stages."),
        Command("verify", "Load the exported files in their runtime and compare them with training."),
        Command("report", "Measure exported files and write a report, or compare several runs."),
        Command("sensitivity", "Measure how much the loss grows when each layer is quantized on its own."),
        Command("allocate", "Choose a format for each layer under a size budget."),
    ],
)
