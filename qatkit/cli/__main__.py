"""Run the command line as `python -m qatkit.cli`."""

from qatkit.cli import main

main()
