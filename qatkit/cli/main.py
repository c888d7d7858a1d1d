"""Entry point of the command-line interface: options of `qatkit` itself, and commands that are imported on use."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qatkit.cli.commands import COMMANDS
from qatkit.cli.dependencies import quiet_dependencies
from qatkit.cli.exits import CODES, TERMINATED, explain, guarded, report_terminated
from qatkit.cli.output import OutputError, echo, prepare_streams
from qatkit.common.tables import implementation
from qatkit.common.termination import Terminated, terminable


class CommandGroup(TyperGroup):
    """The commands of the table. ``--help`` reads only the table; a command's module is imported when it runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one command.

        Raises:
            QatkitError: the command does not exist.
        """
        row = COMMANDS.row(cmd_name)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command(row.name)(guarded(implementation(row.implementation)))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands with full descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl([(row.name, row.description) for row in COMMANDS.values()])


app = typer.Typer(
    name="qatkit",
    cls=CommandGroup,
    epilog=CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from qatkit import __version__

        echo(f"qatkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Training-time compression of PyTorch models: what you train is what you ship."""


def main() -> None:
    """Run the command-line interface."""
    prepare_streams()
    quiet_dependencies()
    try:
        with terminable(report_terminated):
            app()
    except OSError as error:  # commands handle their own, so this is the help page
        sys.exit(explain(OutputError(error)))
    except Exception as error:  # an unknown command, or one that cannot be imported
        sys.exit(explain(error))
    except Terminated:  # before the command started
        report_terminated("")
        sys.exit(TERMINATED)
