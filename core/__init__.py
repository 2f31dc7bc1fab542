"""crossvjp: write a backward rule once; run it unchanged in Flax Linen, Flax NNX, Haiku, Equinox and plain JAX."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._ambient import rules_off as rules_off
from ._boundary import Adapter as Adapter
from ._boundary import Boundary as Boundary
from ._call import Call as Call
from ._channel_variables import channel as channel
from ._channel_variables import channels as channels
from ._channel_variables import settle as settle
from ._channels import Channel as Channel
from ._channels import Overwrite as Overwrite
from ._channels import Stack as Stack
from ._channels import Sum as Sum
from ._compose import compose as compose
from ._cotangents import Cotangents as Cotangents
from ._custom_vjp import custom_vjp as custom_vjp
from ._errors import ArgumentError as ArgumentError
from ._errors import CotangentError as CotangentError
from ._errors import CrossVJPError as CrossVJPError
from ._errors import HandleError as HandleError
from ._errors import MigrationError as MigrationError
from ._function_rule import rule as rule
from ._highway import Highway as Highway
from ._plain import CustomVJP as CustomVJP
from ._pullback import Pullback as Pullback
from ._registry import register_adapter as register_adapter
from ._residuals import Residuals as Residuals
from ._rule import Rule as Rule
from ._rule import static as static
from ._vjp import variables as variables
from ._vjp import vjp as vjp
from ._where import function as function

if _TYPE_CHECKING:
    from . import migration as migration
    from ._attach import attach as attach
    from ._attach import detach as detach
    from ._host import host as host
    from ._sites import sites as sites
    from .migration import migrate as migrate

_LATER = {"attach": "_attach", "detach": "_attach", "host": "_host", "migrate": "migration", "sites": "_sites"}


def __getattr__(name: str) -> _Any:
    """Imports what not every program uses when it is asked for."""
    import importlib

    if name == "migration":
        return importlib.import_module(".migration", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "migration"})
