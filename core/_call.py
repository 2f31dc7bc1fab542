"""`Call`: what a rule sees of the module call that it is put on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ._cotangents import Cotangents
from ._errors import ArgumentError
from ._per_example import masked_examples, per_example
from ._residuals import Residuals
from ._session import Outcome

if TYPE_CHECKING:
    from jaxtyping import PyTree  # a tenth of the time that importing crossvjp takes

Part: TypeAlias = Callable[[], Any]


class Runs(Protocol):
    """The function that a rule is put on, as a `Site` or as the rules inside of a composed one run it."""

    def run(self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Gives the output."""
        ...

    def linearize(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[Any, Callable[[Any], Cotangents], Outcome]:
        """Gives the output, the pullback, and all that the run gave."""
        ...

    def conform_at(
        self, variables: Any, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Callable[[Any, str], Cotangents]:
        """Gives the check of a rule's answer."""
        ...


class Call:
    """What a rule sees of the module call that it is put on.

    Calling it runs the module again, at other variables or inputs: `call(variables, *inputs)`. All
    runs start from the same state and keys, so dropout masks are those of the call itself.
    """

    def __init__(self, site: Runs, parts: Mapping[str, Part]):
        self.site = site
        self.parts = parts

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise ArgumentError(
                f"`call.{name}` is there in `backward` only: while `forward` runs, nothing has been computed yet. "
                "There, call(call.variables, *call.inputs) runs the module, and call.vjp_at gives its pullback too."
            )
        return self.parts[name]()

    @property
    def variables(self) -> PyTree:
        """The variables, in the framework's own containers."""
        return self._part("variables")

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The positional inputs, with `None` for a `jax.Ref`, which can't leave the forward pass."""
        return self._part("inputs")

    @property
    def keywords(self) -> dict[str, Any]:
        """The inputs that were passed by keyword and have no position."""
        return self._part("keywords")

    @property
    def output(self) -> Any:
        """What the call returned; in `backward` only."""
        return self._part("output")

    @property
    def residuals(self) -> Residuals:
        """What the rule's `forward` kept; in `backward` only."""
        return self._part("residuals")

    @property
    def perturbed(self) -> Cotangents:
        """Booleans in the places of the cotangents: which arrays are differentiated at all, so that work can be spared.

        Where JAX can't say, every floating array counts.
        """
        return self._part("perturbed")

    @property
    def key(self) -> Any:
        """The PRNG key that was given with the module; the same in `forward`, in `backward` and under remat.

        Raises:
            ArgumentError: none was given.
        """
        key = self._part("key")
        if key is None:
            raise ArgumentError(
                "The rule draws random numbers, but the call has no key. Give one with the module, rule(mdl, key=key) "
                "or rule.lift(fn, key=key): self.make_rng('rule') in Linen, rngs.rule() in NNX, hk.next_rng_key() in "
                "Haiku, an argument in Equinox and plain JAX."
            )
        return key

    def pullback(self, y_bar: Any) -> Cotangents:
        """Pulls a cotangent of the module's output back, linearised at the call; any number of times.

        Args:
            y_bar: shaped like the output of the module; `None`, whole or in part, stands for zero.

        Returns:
            The cotangents of the inputs and the variables; those that nothing depends on are zeros.

        Raises:
            CotangentError: `y_bar` does not have the structure or shapes of the output.
        """
        return self._part("pullback")(y_bar)

    def __call__(self, variables: PyTree, *inputs: Any, **keywords: Any) -> Any:
        """Runs the module at other variables and inputs; what it writes into its state is dropped.

        When `forward` runs it, outside of loops, the last run's state is the state of the call.

        Args:
            variables: with the structure of `call.variables`; dtypes may differ.
            *inputs: any inputs that the module takes.
            **keywords: those that have no position.

        Returns:
            The output.

        Raises:
            ArgumentError: `variables` has another structure.
        """
        return self.site.run(variables, inputs, keywords)

    def vjp_at(self, variables: PyTree, *inputs: Any, **keywords: Any) -> tuple[Any, Callable[[Any], Cotangents]]:
        """Runs the module at other variables and inputs, and linearises it there.

        Args:
            variables: as in a call.
            *inputs: as in a call.
            **keywords: as in a call.

        Returns:
            The output, and the pullback there, which is a pytree of arrays and may be a residual.

        Raises:
            ArgumentError: `variables` has another structure.
        """
        return self.site.linearize(variables, inputs, keywords)[:2]

    def per_example(self, y_bar: Any, *, independent: bool = True) -> Cotangents:
        """Pulls the cotangent of each example of a batch back by itself.

        Args:
            y_bar: the cotangent of the output; every leaf has the batch on axis 0, as have the
                arrays among the inputs. Scalars among these belong to every example.
            independent: the module treats each example by itself, so that each is run alone, at
                the cost of one pullback of the batch. Otherwise (batch normalisation, dropout with
                one key for the batch) each is pulled back through the whole batch, at the cost of
                as many pullbacks as there are examples; then `inputs` has zero cotangents where examples
                do not meet.

        Returns:
            Cotangents whose leaves have one more axis in front, the example's. If `independent`,
            those of the inputs keep the shape of the inputs, each example having its own.

        Raises:
            ArgumentError: a leaf has no batch axis, or `independent` is said of a module that
                writes state or draws keys in the call.
        """
        if not independent:
            return masked_examples(self.pullback, y_bar)
        return per_example(self.site.linearize, self.variables, self.inputs, self.keywords, y_bar)

    def as_cotangents(self, result: Any, author: str) -> Cotangents:
        """Checks what a rule returned for this call, and names its parts; zeros stand for `None`.

        Raises:
            CotangentError: not one cotangent for each input and one for the variables.
        """
        return self.parts["conform"]()(result, author)

    def at(self, variables: PyTree, *inputs: Any, **keywords: Any) -> Call:
        """Gives the call as it would be at other variables and inputs; what it needs is computed when asked for."""

        def linearized() -> tuple[Any, Any]:
            return self.vjp_at(variables, *inputs, **keywords)

        changed: dict[str, Part] = {
            "variables": lambda: variables,
            "inputs": lambda: inputs,
            "keywords": lambda: keywords,
            "output": lambda: self(variables, *inputs, **keywords),
            "pullback": lambda: linearized()[1],
            "conform": lambda: self.site.conform_at(variables, inputs, keywords),
        }
        return Call(self.site, {**self.parts, **changed})
