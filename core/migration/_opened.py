"""The protocol between migration and a framework's models: a model's arrays by paths, and a pure way to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from .._registry import known_adapters
from ._layer import Arrays

if TYPE_CHECKING:
    from .._running import Running

Call: TypeAlias = Callable[..., Any]
"""`(mdl, *sample) -> y`; for an Equinox model with state, `(mdl, state, *sample) -> (y, state)`."""


class Opened(Protocol):
    """A model of a framework, taken apart."""

    framework: str
    """What tables and errors call the framework."""

    params: Arrays
    """The trainable parameters by their paths; types, where the model has no values yet."""

    state: Arrays
    """What its calls write: running statistics and the like. Random keys and their counters are no part of it."""

    def run(self, call: Call | None, params: Arrays, state: Arrays, sample: Sequence[Any]) -> tuple[Any, Arrays]:
        """Runs `call(mdl, *sample)` on a model that holds the given arrays; gives the output and the state after it.

        Without `call`, as the framework's users call a model.
        """
        ...

    def observed(self, running: Running) -> Opened:
        """Gives the model as one that tells `running` of every call of a module while it runs."""
        ...

    def inside(self, module: Any) -> tuple[Arrays, Arrays] | None:
        """Gives the parameters and state below a live module, as the module sees them; `None` if nobody knows.

        In a loop over stacked layers, they lack the axes that they are stacked along.
        """
        ...

    def tree(self, params: Arrays) -> Any:
        """Gives parameters in the framework's own containers, as its optimizers take them."""
        ...

    def flat(self, tree: Any) -> Arrays | None:
        """Takes a tree that `tree` could have given apart; `None` if it is no such tree."""
        ...

    def made(self, params: Arrays, state: Arrays) -> tuple[Any, Any, Any]:
        """Makes a model of the framework with these arrays.

        Returns:
            The model in the form in which a target is given; the variables that go with it, if the framework keeps
            them apart, or else `None`; and both in the form in which a source is given.
        """
        ...


@runtime_checkable
class Migration(Protocol):
    """What an adapter whose models can be moved offers beside `Adapter`, as its attribute `migration`."""

    def owns(self, model: Any) -> bool:
        """Says whether `model` is a model of this framework, in a form that is told by its type."""
        ...

    def source(self, model: Any) -> Opened:
        """Opens a trained model.

        Raises:
            MigrationError: it has no values.
        """
        ...

    def target(self, model: Any, call: Call | None, sample: Sequence[Any]) -> Opened:
        """Opens a model that is to get values; where it has no variables, it is initialised on types."""
        ...


def migration_of(model: Any) -> Migration | None:
    """Finds the framework of a model."""
    for adapter in known_adapters():
        migration = getattr(adapter, "migration", None)
        if isinstance(migration, Migration) and migration.owns(model):
            return migration
    return None


def framework_of(model: Any) -> str | None:
    """Names the framework of a model that can be moved, as its adapter is named; `None` for everything else."""
    for adapter in known_adapters():
        migration = getattr(adapter, "migration", None)
        if isinstance(migration, Migration) and migration.owns(model):
            return adapter.name
    return None
