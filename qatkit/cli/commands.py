"""The table of commands. To add a command, add a row here and a file with the same name, which is imported on use."""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.common.tables import Table


@dataclass(frozen=True)
class Command:
    """A command of the command-line interface."""

    name: str
    description: str
    """One sentence for `qatkit --help`, which is also the first line of the function's docstring."""
    implementation: str = ""
    """The function as ``module:function``; by default ``command`` in the file with the command's name."""

    def __post_init__(self) -> None:
        if not self.implementation:
            module = f"qatkit.cli.{self.name.replace('-', '_')}"
            object.__setattr__(self, "implementation", f"{module}:command")


COMMANDS = Table(
    "command",
    [
        Command("list", "List the built-in recipes."),
        Command("show", "Print a recipe."),
        Command("validate", "Check a recipe and predict its memory use, without loading data or training."),
        Command("plan", "Predict memory use for training and serving, without loading weights."),
        Command("profile", "Find a model's bottleneck on a device, and the largest speedup of each technique."),
        Command("advise", "Propose compression plans for a model and a device, and write a recipe."),
        Command("run", "Run a recipe: train, export, verify, measure and report."),
        Command("sweep", "Run a recipe with all combinations of values, and compare the results in one page."),
        Command("search", "Find the smallest or fastest model whose metric loses at most a given part."),
        Command("cache-teacher", "Compute and store a recipe's teacher outputs."),
        Command("export", "Export a run's finished stages."),
        Command("verify", "Run exported files in their runtime and compare them with the trained models."),
        Command("environment", "Create a Python environment for a runtime that qatkit's own environment lacks."),
        Command("report", "Measure exported files and write a report, or compare multiple runs."),
        Command("bench", "Measure the speed, load time, memory and size of exported files in their runtimes."),
        Command("generate", "Let an exported language model continue a text in its runtime."),
        Command("push", "Upload a verified file and its model card to the Hugging Face hub."),
        Command(
            "cost",
            "Compute the cost of serving from measured latencies, from one that you pass, or from predicted ones.",
        ),
        Command("sensitivity", "Measure the loss increase when each layer is quantized on its own."),
        Command("allocate", "Choose a format for each layer within a size budget."),
    ],
)
