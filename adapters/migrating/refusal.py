"""The error of what is wrong on the command line."""

from __future__ import annotations

from crossvjp import CrossVJPError


class UsageError(CrossVJPError):
    """An argument of the command names nothing, or something else than expected."""
