"""Run a command in the process of the tests, which spares the seconds that a process takes to start."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from qatkit.cli.main import main
from tests.support import warm


class Done(NamedTuple):
    """The result of a command."""

    code: object
    out: str
    err: str


STARTING = ("bench", "search", "sweep")
"""Commands that start processes."""


def qatkit(*arguments: str, cwd: Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    forked = warm.children() if arguments[0] in STARTING else nullcontext()
    with forked, pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["qatkit", *arguments])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` replaces it
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")  # and sets this
        with pytest.raises(SystemExit) as ended:
            main()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    return Done(ended.value.code, out.getvalue(), err.getvalue())
