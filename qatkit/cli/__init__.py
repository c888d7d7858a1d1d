"""The command line. Every command takes a recipe or a run folder; `qatkit.cli.commands` lists them."""

from qatkit.cli.main import main as main
