"""The command line. Every command takes a recipe or the folder of a run; `qatkit.cli.commands` lists them."""

from qatkit.cli.main import main as main
