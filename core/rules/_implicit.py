"""Rules whose gradient comes from an equation that the output solves, in memory that the solver's steps do not grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import at_least, positive
from .._rule import Rule, static
from ._trees import add, dot, scale, sub


class FixedPoint(Rule):
    r"""Iterates the module to its fixed point, and differentiates the fixed point instead of the iterations.

        forward:   z <- z + damping (f(variables, *x, z) - z),          `steps` times from the last input z
        backward:  u <- u + damping (y_bar + J^T u - u),   J = df/dz at the output,   `backward_steps` times from u = 0
                   inputs_bar and variables_bar: the module's own pullback of u at the output; zero for the first z

    Both converge if `(1 - damping) I + damping J` is a contraction; then the cotangents are those of the fixed point,
    u = (I - J^T)^-1 y_bar. Linear in `y_bar` for any number of steps. One backward step with `damping=1`, u = y_bar,
    is Jacobian-free backpropagation, and k are the k terms of the phantom gradient's (damped) Neumann series.

    The module takes and returns z, any tree of floating arrays, as its last positional input and its only output.

    Args:
        steps: >= 1, of the forward pass.
        backward_steps: >= 1, each of one pullback.
        damping: > 0, dimensionless; 1 is the plain iteration.

    Raises:
        ArgumentError: a number of steps is below 1, or `damping` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> babylonian = lambda mdl, x, z: (z + x / z) / 2
        >>> root = lambda x: FixedPoint(steps=20).lift(babylonian)(None, x, jnp.array(1.0))
        >>> float(root(4.0)), float(jax.grad(root)(4.0))
        (2.0, 0.25)

    Reference:
        Bai, Kolter, Koltun (2019), arXiv:1909.01377, theorem 1. JFB: Fung et al. (2022), arXiv:2103.12803. Phantom
        gradient: Geng et al. (2021), arXiv:2111.05177.
    """

    steps: int = static(default=100)
    backward_steps: int = static(default=100)
    damping: Float[Array, ""] | float = 1.0

    symbolic_zeros = False

    def __post_init__(self) -> None:
        at_least(self, "steps", 1)
        at_least(self, "backward_steps", 1)
        positive(self, "damping")

    def forward(self, call: Any) -> Any:
        """Iterates."""
        *x, z = call.inputs
        step = partial(call, call.variables, *x, **call.keywords)
        return jax.lax.fori_loop(0, self.steps, lambda _, z: self._towards(z, step(z)), z)

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Iterates the adjoint equation at the output."""
        *x, _ = call.inputs
        _, pullback = call.vjp_at(call.variables, *x, call.output, **call.keywords)
        u = scale(y_bar, self.damping)  # after the first step, from 0
        rest = self.backward_steps - 1
        u = jax.lax.fori_loop(0, rest, lambda _, u: self._towards(u, add(y_bar, pullback(u).inputs[-1])), u)
        bar = pullback(u)
        return bar.replace(inputs=(*bar.inputs[:-1], None))

    def _towards(self, now: PyTree, then: PyTree) -> PyTree:
        return add(now, scale(sub(then, now), self.damping))


class NeuralODEAdjoint(Rule):
    r"""Integrates the module as the right side of an ODE, and the adjoint ODE backwards in the backward pass.

        forward:   dz/ds = f(variables, z, *x) for s from 0 to `time`,   z(0) = the first input,   output z(time)
        backward:  da/ds = -a^T df/dz for s from `time` to 0,   a(time) = y_bar,   z beside it;   the first input's
                   cotangent is a(0)
                   variables_bar = integral of a^T df/dvariables ds,   x_bar likewise,   time_bar = y_bar^T f(z(time))

    Nothing of the trajectory is kept. Both passes take `steps` equal steps of the classical Runge-Kutta method, so the
    cotangents are those of the ODE up to its error, of fourth order, and not those of the discrete forward pass.
    The module returns a tree like z, of floating arrays; if f depends on time, that is a part of z with derivative 1. A
    z that forgets where it came from, stiff or chaotic, can't be integrated back.

    Args:
        time: how long, in units of the ODE's time; may be negative, and gets a cotangent.
        steps: >= 1.

    Raises:
        ArgumentError: `steps` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grow = lambda rate: NeuralODEAdjoint(1.0).lift(lambda rate, z: rate * z)(rate, jnp.array(1.0))
        >>> print(f"{grow(jnp.array(0.5)):.4f} {jax.grad(grow)(jnp.array(0.5)):.4f}")  # both are exp(0.5)
        1.6487 1.6487

    Reference:
        Chen, Rubanova, Bettencourt, Duvenaud (2018), arXiv:1806.07366.
    """

    time: Float[Array, ""] | float = 1.0
    steps: int = static(default=50)

    symbolic_zeros = False

    def __post_init__(self) -> None:
        at_least(self, "steps", 1)

    def forward(self, call: Any) -> Any:
        """Integrates the module."""
        z, *x = call.inputs
        return self._integrate(lambda z: call(call.variables, z, *x, **call.keywords), z)

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Integrates z, its adjoint and the other cotangents backwards."""
        _, *x = call.inputs

        def back(state: Any) -> Any:
            dz, pullback = call.vjp_at(call.variables, state[0], *x, **call.keywords)
            bar = pullback(state[1])
            return scale(dz, -1), bar.inputs[0], bar

        dz, _, slope = back((call.output, y_bar))
        zeros = jax.tree.map(jnp.zeros_like, slope)
        _, z_bar, bar = self._integrate(back, (call.output, y_bar, zeros))
        return bar.replace(inputs=(z_bar, *bar.inputs[1:])).with_fields(time=-dot(y_bar, dz))

    def _integrate(self, slope: Callable[[Any], Any], state: Any) -> Any:
        def after(state: Any, slope: Any, part: Any) -> Any:
            return add(state, scale(slope, part * self.time / self.steps))

        def step(_: Any, state: Any) -> Any:
            def stage(carry: Any, parts: Any) -> Any:
                (last, new), (to, weight) = carry, parts
                now = slope(after(state, last, to))
                return (now, after(new, now, weight)), None

            # A loop over the four stages, so that the module stands in the program once.
            parts = jnp.array([0, 1 / 2, 1 / 2, 1]), jnp.array([1 / 6, 1 / 3, 1 / 3, 1 / 6])
            start = jax.tree.map(jnp.zeros_like, state), state
            return jax.lax.scan(stage, start, parts)[0][1]

        return jax.lax.fori_loop(0, self.steps, step, state)
