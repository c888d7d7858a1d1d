"""Suppress messages that dependencies print about themselves."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from qatkit.cli.output import echo
from qatkit.errors import QatkitWarning

_LOGGERS = ("torchao", "torch.utils._pytree", "torch.distributed.elastic", "bitsandbytes")
_show = warnings.showwarning
_PACKAGE = str(Path(__file__).parent.parent)


def quiet_dependencies() -> None:
    """Show only warnings from qatkit and the user's own code, and suppress log messages from imported packages.

    QATKIT_DEBUG=1 shows everything.
    """
    warnings.showwarning = _show_warning
    if os.environ.get("QATKIT_DEBUG") == "1":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also of transformers' "Loading weights"
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
    if issubclass(category, QatkitWarning):
        echo(f"warning: {message}", err=True)
    elif os.environ.get("QATKIT_DEBUG") == "1" or not _is_installed(filename):
        _show(message, category, filename, *rest, **named)


def _is_installed(file: str) -> bool:
    """Whether a file belongs to qatkit or a dependency, so that a warning from it is not actionable for users."""
    return file.startswith(("<", _PACKAGE)) or "site-packages" in file or "dist-packages" in file
