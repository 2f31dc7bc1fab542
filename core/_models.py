"""The protocol between `attach` and a framework's models: what is a model outside of any trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ._errors import HandleError
from ._registry import known_adapters

if TYPE_CHECKING:
    from ._attachment import Attachment
    from ._running import Running


@runtime_checkable
class Models(Protocol):
    """What an adapter whose framework has models to attach rules to offers beside `Adapter`."""

    def owns(self, model: Any) -> bool:
        """Says whether `model` is a model of this framework."""
        ...

    def attach(self, model: Any, attachment: Attachment) -> Any:
        """Gives a model of the same kind, with the same variables, in which the chosen calls run under their rules.

        It takes the place of what `attachment_of` gives; what is attached to parts of the model stays.

        Raises:
            HandleError: rules can't be attached to the model, or not here.
            ArgumentError: something is chosen that can't be wrapped; or nothing is, where that can be known.
        """
        ...

    def detach(self, model: Any) -> Any:
        """Gives the model without rules, with its variables as they are now; a model without rules as it is."""
        ...

    def attachment_of(self, model: Any) -> Attachment | None:
        """Gives what is attached to the model, as opposed to parts of it."""
        ...

    def record(
        self, model: Any, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        """Runs the plain model on types; gives a `Row` for every call of a module, and the program."""
        ...

    def intercepting(self, running: Running) -> contextlib.AbstractContextManager[None]:
        """A context in which every call of a module of this framework goes by `running.call`.

        Frameworks whose modules stand in the model itself, to be exchanged there, do nothing.
        """
        ...


def models_of(model: Any) -> Models:
    """Finds the framework of a model.

    Raises:
        HandleError: no framework knows it.
    """
    for adapter in known_adapters():
        models = getattr(adapter, "models", None)
        if isinstance(models, Models) and models.owns(model):
            return models
    raise HandleError(
        "Rules are attached to a Linen module, an NNX module, an Equinox module, hk.Transformed, "
        f"hk.TransformedWithState or a function, but this is a {type(model).__name__}."
    )


@contextlib.contextmanager
def interceptors(running: Running) -> Iterator[None]:
    """Lets all loaded frameworks tell of their modules' calls: a model of one may run another's."""
    with contextlib.ExitStack() as stack:
        for adapter in known_adapters():
            models = getattr(adapter, "models", None)
            if isinstance(models, Models):
                stack.enter_context(models.intercepting(running))
        yield
