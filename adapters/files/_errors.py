"""The error of files that hold something else than expected."""

from __future__ import annotations

from crossvjp import CrossVJPError


class FileError(CrossVJPError, ValueError):
    """A file is corrupt, foreign, or does not fit the model; or a format can't hold what is to be written."""
