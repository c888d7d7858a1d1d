"""Stop chat templates that do not terminate: they come with models, and may contain an infinite loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from qatkit.errors import QatkitError

MOST_STEPS = 5_000_000
"""Maximum number of steps (executed lines of a compiled template, and calls from it) to render one conversation;
typical templates need a few dozen per turn. The limit counts steps rather than seconds, so it does not depend on the
machine or its load.
"""
_TEMPLATE = "<template>"
"""The file name that Jinja gives to the code of a template."""

Result = TypeVar("Result")


def limited(render: Callable[[], Result], tokenizer: str) -> Result:
    """Call a function that renders a chat template, and stop it after too many steps.

    Jinja's sandbox limits neither loops nor mutual recursion of macros. Steps are counted with Python's tracing, which
    covers only the current thread. It therefore works in threads and in data loader workers, where signals do not
    arrive, and needs no second process. An expensive operation on a huge number counts as one step.

    Args:
        render: Renders a conversation once.
        tokenizer: Folder or name of the tokenizer, for the error.

    Raises:
        QatkitError: the template exceeded `MOST_STEPS`.
    """
    left = MOST_STEPS

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooManySteps
        # lines of the template; of everything else, such as filters, calls
        return trace if frame.f_code.co_filename == _TEMPLATE else None

    before = sys.gettrace()  # a debugger, or a measurement of coverage
    sys.settrace(trace)
    try:
        return render()
    except _TooManySteps:
        raise QatkitError(
            f"the template of tokenizer '{tokenizer}' was stopped after {MOST_STEPS} steps for one conversation, "
            "because it probably never ends",
            key="chat_template",
            advice="set chat_template to a file whose template terminates, or fix the tokenizer's template",
        ) from None
    finally:
        sys.settrace(before)


class _TooManySteps(BaseException):
    """Not an Exception: code that ignores those of a template must not ignore this one."""
