"""The command line: every command takes a recipe or the folder of a run."""

from qatkit.cli.main import main as main
