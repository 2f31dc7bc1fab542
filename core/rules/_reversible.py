"""Reversible networks: their backward pass computes the activations again from the output, so none are kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._checks import at_least
from .._cotangents import Cotangents
from .._rule import Rule, static
from ._trees import add, sub


class ReversibleStack(Rule):
    r"""Inverts a whole stack of additive couplings in the backward pass; keeps its output alone.

        coupling k:  (x1, x2) -> (y1, y2) = (x2, x1 + F_k(x2));    two of them are a block of the paper, with F and G
        backward, from the last coupling to the first:   x2 = y1,   x1 = y2 - F_k(y1),
                  the coupling's own pullback, linearised at these

    The function takes `(x1, x2, layer)` and runs all couplings if `layer` is `None`, else only the one of that number:

        def stack(blocks, x1, x2, layer=None):
            for block in blocks if layer is None else [blocks[layer]]:
                x1, x2 = x2, x1 + block(x2)
            return x1, x2

    What is kept does not grow with `depth`. The activations are found again up to rounding, which grows along the
    stack: with couplings of tanh layers, to 2e-7 of their size after 16 and to 3e-6 after 128 in float32, and to 0.15
    after 128 in bfloat16, which is too much. A coupling must compute the same when it runs alone; dropout with keys of
    the module's own, and state that is written, need `ReversibleBlock`.

    Args:
        depth: >= 1, the number of couplings.

    Raises:
        ArgumentError: `depth` is below 1.

    Reference:
        Gomez, Ren, Urtasun, Grosse (2017), arXiv:1707.04585, algorithm 1.
    """

    depth: int = static()

    exact = True
    symbolic_zeros = False

    def __post_init__(self) -> None:
        at_least(self, "depth", 1)

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Inverts one coupling after the other."""
        (y1, y2), variables_bar, keywords_bar = call.output, None, {}
        for layer in reversed(range(self.depth)):
            x2 = y1
            # F_k does not see x1, so at x1 = 0 the coupling gives F_k(x2), and has the pullback that is wanted.
            (_, f), pullback = call.vjp_at(call.variables, _zeros(y2), x2, layer, **call.keywords)
            bar = pullback(y_bar)
            (y1, y2), y_bar = (sub(y2, f), x2), bar.inputs[:2]
            variables_bar = add(bar.variables, variables_bar)
            keywords_bar = add(bar.keywords, keywords_bar or None)
        return Cotangents((*y_bar, *[None] * (len(call.inputs) - 2)), variables_bar, keywords=keywords_bar)


class ReversibleBlock(Rule):
    r"""Inverts one additive coupling in the backward pass, from its output, which comes back over a highway.

        coupling:  (x1, x2, road) -> (y1, y2, road) = (x2, x1 + F(x2), road)
        backward:  (y1, y2) read from the road,   x2 = y1,   x1 = y2 - F(y1),   (x1, x2) carried on,
                   the coupling's own pullback, linearised at these

    Neither its inputs nor its output are kept, so what is kept does not grow with the number of blocks, in a scan
    neither. The chain starts with `road = cv.Highway((x1, x2))` and ends with
    `y1, y2 = road.depart((y1, y2), primal=True)`, which sends its output down. In between, each block must get the last
    one's output as it is: what is done to it there, no block inverts. Rounding as in `ReversibleStack`.

    Reference:
        Gomez, Ren, Urtasun, Grosse (2017), arXiv:1707.04585, algorithm 1.
    """

    exact = True
    symbolic_zeros = False

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Inverts the coupling, and carries its inputs on."""
        y1_bar, y2_bar, road = y_bar
        x2, y2 = road.read()
        (_, f, _), pullback = call.vjp_at(call.variables, _zeros(y2), x2, *call.inputs[2:], **call.keywords)
        bar = pullback((y1_bar, y2_bar, None))
        return bar.replace(inputs=(*bar.inputs[:2], road.carry((sub(y2, f), x2))))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)
