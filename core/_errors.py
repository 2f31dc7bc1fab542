"""The errors of the library: one base, four kinds."""

from __future__ import annotations


class CrossVJPError(Exception):
    """Base class of every error that crossvjp itself raises."""


class HandleError(CrossVJPError, TypeError):
    """A module handle can't be opened: unknown, unbound, mixed, or used where its scope is gone."""


class ArgumentError(CrossVJPError, TypeError, ValueError):
    """An argument of a public function does not mean anything here.

    It is a `TypeError` and a `ValueError`, because JAX raises the one and Flax the other for the
    same mistakes, and code that moves over catches what it caught before.
    """


class CotangentError(CrossVJPError, TypeError, ValueError):
    """A cotangent has the wrong order, structure, shape or dtype; JAX raises a `TypeError` or a `ValueError` for it."""


class MigrationError(CrossVJPError, ValueError):
    """A model can't be moved as asked: layers without a counterpart, of other shapes or other functions; or it differs.

    Attributes:
        report: what is known of the two models, if both could be traced.
    """

    report: object = None
