"""Optional packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from qatkit.errors import QatkitError


def check_packages(needer: str, packages: Sequence[str], extra: str) -> None:
    """Raise an error if a package that a component needs is missing.

    Args:
        needer: The component, as the subject of the message: "format 'onnx'".
        packages: Import names.
        extra: The optional dependency group that installs them.

    Raises:
        QatkitError: a package is missing; the error includes the command that installs it.

    Example:
        >>> check_packages("task 'detection'", ["json"], "detection")
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise QatkitError(
            f"{needer} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            advice=f"run: pip install 'qatkit[{extra}]'",
        )
