"""The one kind of error a user's mistake raises, and the one kind of warning qatkit gives."""

from __future__ import annotations


class QatkitError(ValueError):
    """A mistake in what the user gave: names the key or layer, the value seen, and what to write instead."""


class QatkitWarning(UserWarning):
    """Something the user asked for has no effect, or works slower or less exactly than it looks."""
