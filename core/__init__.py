"""crossvjp: write a backward rule once; run it unchanged in Flax Linen, Flax NNX, Haiku, Equinox and plain JAX."""

from ._boundary import Adapter as Adapter
from ._boundary import Boundary as Boundary
from ._cotangents import Cotangents as Cotangents
from ._custom_vjp import custom_vjp as custom_vjp
from ._errors import ArgumentError as ArgumentError
from ._errors import CotangentError as CotangentError
from ._errors import CrossVJPError as CrossVJPError
from ._errors import HandleError as HandleError
from ._plain import CustomVJP as CustomVJP
from ._registry import register_adapter as register_adapter
from ._rule import Call as Call
from ._rule import Rule as Rule
from ._rule import rule as rule
from ._rule import static as static
from ._session import Pullback as Pullback
from ._vjp import variables as variables
from ._vjp import vjp as vjp
