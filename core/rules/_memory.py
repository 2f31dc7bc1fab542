"""Rules that give the module's own gradient for less memory: by computing again, in parts, or from fewer numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._arrays import Layout, is_ref, take_apart
from .._channels import Overwrite
from .._checks import at_least
from .._errors import ArgumentError
from .._residuals import Residuals
from .._rule import Rule, static
from ._trees import add, scale, sub, times


class Recompute(Rule):
    r"""Runs the module again in the backward pass, so that only its variables and inputs are kept.

        inputs_bar, variables_bar = the module's own pullback of y_bar, linearised again at its variables and inputs

    The second run waits for `y_bar`, and the compiler may not merge it with the first. Dropout masks are those of the
    first run. It is `jax.checkpoint` for one module call.

    Reference:
        Chen, Xu, Zhang, Guestrin (2016), arXiv:1604.06174.
    """

    exact = True

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Linearises again."""
        return _linearized_again(call, call.variables, y_bar)


class Microbatch(Rule):
    r"""Runs the module on one part of the batch after the other, forwards and backwards; keeps its inputs alone.

        y = the parts' outputs, joined along the batch;   a scalar is their mean, or their sum
        variables_bar = sum over the parts of the module's own pullback of their y_bar, linearised again

    Each array of the inputs and of the output has the batch on axis 0, but for scalars of the output, such as a
    loss. Inputs by keyword belong to every part. The gradient is summed at least in float32. For modules that treat
    each example by itself: all parts have the same dropout masks, and a state that is written is that of a run on the
    whole batch.

    Args:
        parts: >= 1, divides the batch.
        scalars: what the whole batch's scalar is of those of the parts: `"mean"` or `"sum"`.

    Raises:
        ArgumentError: `parts` is below 1 or does not divide the batch, an array of the inputs has no batch axis, or
            `scalars` is another word.

    Reference:
        Gradient accumulation; Chen, Xu, Zhang, Guestrin (2016), arXiv:1604.06174, for computing again.
    """

    parts: int = static()
    scalars: str = static(default="mean")

    exact = True

    def __post_init__(self) -> None:
        at_least(self, "parts", 1)
        if self.scalars not in ("mean", "sum"):
            raise ArgumentError(f"`scalars` of {self!r} must be 'mean' or 'sum', but is {self.scalars!r}.")

    def forward(self, call: Any) -> Any:
        """Runs the parts."""
        arrays, layout = _split(call.inputs, self.parts, self)
        y = jax.lax.map(lambda part: call(call.variables, *layout.fill(part), **call.keywords), arrays)
        whole = jnp.mean if self.scalars == "mean" else jnp.sum
        return jax.tree.map(lambda leaf: whole(leaf, 0) if leaf.ndim == 1 else _joined(leaf), y)

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Runs the parts again, each with its pullback, and adds up."""
        arrays, layout = _split(call.inputs, self.parts, self)
        each = 1 / self.parts if self.scalars == "mean" else 1
        seeds = jax.tree.map(
            lambda bar: _parted(bar, self.parts) if bar.ndim else jnp.full(self.parts, times(bar, each)), y_bar
        )

        def pull(part: Any) -> Any:
            inputs, seed = part
            _, pullback = call.vjp_at(call.variables, *layout.fill(inputs), **call.keywords)
            bar = pullback(seed)
            return bar.replace(inputs=(None,) * len(bar.inputs)), bar.inputs

        bar, inputs_bar = _summed(pull, (arrays, seeds))
        return bar.replace(inputs=jax.tree.map(_joined, inputs_bar))


class ChunkedCrossEntropy(Rule):
    r"""Computes a mean loss and its gradient for one part of the batch after the other, both in the forward pass.

        loss = mean of the parts' losses;   forward:  g = mean of their gradients;   backward:  y_bar g

    Made for a language model's head, `loss(head, hidden, labels)`, the mean cross-entropy of `head(hidden)`: the logits
    of one part are all that ever exists of them, and none is computed twice. What is kept is the gradient, an array
    like the hidden states and one like the variables. Any function will do whose one scalar output is a mean over
    axis 0 of all its inputs' arrays. Inputs by keyword belong to every part. Eagerly, a call that nobody
    differentiates computes the gradient too; compiled, it does not.

    Args:
        parts: >= 1, divides the batch (the number of tokens).

    Raises:
        ArgumentError: `parts` is below 1 or does not divide the batch, an array of the inputs has no batch axis, or
            the output is not a scalar.

    Reference:
        Hsu et al. (2024), Liger Kernel, arXiv:2410.10989.
    """

    parts: int = static()

    exact = True

    def __post_init__(self) -> None:
        at_least(self, "parts", 1)

    def forward(self, call: Any) -> Any:
        """Computes the loss and its gradient."""
        arrays, layout = _split(call.inputs, self.parts, self)

        def pull(part: Any) -> Any:
            loss, pullback = call.vjp_at(call.variables, *layout.fill(part), **call.keywords)
            shapes = jax.tree.map(jnp.shape, loss)
            if shapes != ():
                raise ArgumentError(f"{self!r} is for functions that return one scalar, but this has shapes {shapes}.")
            bar = pullback(jnp.full_like(loss, 1 / self.parts))
            return (loss / self.parts, bar.replace(inputs=(None,) * len(bar.inputs))), bar.inputs

        (loss, bar), inputs_bar = _summed(pull, arrays)
        return loss, Residuals(bar=bar.replace(inputs=jax.tree.map(_joined, inputs_bar)))

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Multiplies the gradient by the loss's cotangent."""
        return scale(call.residuals.bar, y_bar)


class ColumnRowSampling(Rule):
    r"""Estimates the variables' cotangent from some rows of the batch, drawn at random; keeps no others for it.

        variables_bar = B / k * the module's own pullback of y_bar on k of the B rows, drawn without replacement

    Unbiased, with a variance that falls to 0 at k = B; the inputs' cotangent is exact. On a linear layer only k rows
    are kept; where the inputs' cotangent itself needs them (a nonlinear module), all are. Needs a `key`. For modules
    that treat each example by itself. The paper draws by the rows' norms; uniform draws are unbiased for biases too.

    Args:
        rows: >= 1 and at most the batch, k.

    Raises:
        ArgumentError: `rows` is below 1 or above the batch, or an array of the inputs has no batch axis.

    Reference:
        Adelman, Levy, Hakimi, Silberstein (2021), arXiv:1805.08079.
    """

    rows: int = static()

    needs_variables = True

    def __post_init__(self) -> None:
        at_least(self, "rows", 1)

    def forward(self, call: Any) -> Any:
        """Draws the rows."""
        arrays, layout = take_apart(call.inputs)
        size = _batch_size(arrays, self)
        if self.rows > size:
            raise ArgumentError(f"{self!r} can't draw so many rows of a batch of {size}.")
        drawn = jax.random.permutation(call.key, size)[: self.rows]
        kept = Residuals(drawn=drawn, inputs=layout.fill([jnp.asarray(array)[drawn] for array in arrays]))
        return call(call.variables, *call.inputs, **call.keywords), kept

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Pulls back through the rows for the variables, and through all for the inputs."""
        drawn = call.residuals.drawn
        _, pullback = call.vjp_at(call.variables, *call.residuals.inputs, **call.keywords)
        few = jax.tree.map(lambda bar: bar[drawn] * jnp.asarray(len(bar) / self.rows, bar.dtype), y_bar)
        return call.pullback(y_bar).replace(variables=pullback(few).variables)


class OptimizerInBackward(Rule):
    r"""Takes a step of SGD in the backward pass, as soon as a module's gradient is there, and lets go of the gradient.

        parameters <- parameters - learning_rate * g,   variables_bar = 0
        g = the module's own variables_bar, linearised again at `parameters`

    The parameters are mutable arrays, and the module is called on their values. The backward pass reads them once more,
    so neither parameters nor gradients exist twice. Differentiate with respect to something that reaches the
    module's inputs or variables, so that there is a backward pass at all:

        y = OptimizerInBackward(refs, 0.1).lift(fn)(jax.tree.map(lambda ref: ref[...], refs), x)

    In a scan over stacked layers, `at` is the layer's number and the values are `ref[at]`. A module that is called
    twice takes two steps, the second one at the parameters after the first. JAX refuses such writes under `vmap`;
    there, or where no array may be mutable, `parameters` is a channel, whose gradient has the new ones, for `settle`.

    Args:
        parameters: a tree of `jax.Ref`, or a `cv.Overwrite` of a tree of arrays, with the leaves of the variables in
            their order.
        learning_rate: in units of parameter per gradient.
        at: where in each ref the module's values stand; everywhere by default.

    Raises:
        ArgumentError: `parameters` has another number of leaves than the variables, or one of a tree is no `jax.Ref`.

    Reference:
        Lv et al. (2023), LOMO, arXiv:2306.09782.
    """

    parameters: PyTree
    learning_rate: Float[Array, ""] | float = 0.01
    at: Any = ...

    needs_variables = True

    def backward(self, call: Any, y_bar: Any) -> Any:
        """Writes the new parameters."""
        channel = self.parameters if isinstance(self.parameters, Overwrite) else None
        held, treedef = jax.tree.flatten(channel.value if channel else self.parameters)
        self._check(held, jax.tree.structure(call.variables), channel)
        values = [leaf[self.at] if is_ref(leaf) else leaf for leaf in held]
        bar = _linearized_again(call, jax.tree.unflatten(jax.tree.structure(call.variables), values), y_bar)
        new = sub(values, scale(jax.tree.leaves(bar.variables), self.learning_rate))
        bar = bar.replace(variables=None)
        if channel:
            return bar.with_fields(parameters=channel.emit(jax.tree.unflatten(treedef, new)))
        for ref, value in zip(held, new, strict=True):
            ref[self.at] = value
        return bar

    def _check(self, held: list[Any], treedef: Any, channel: Any) -> None:
        if len(held) != treedef.num_leaves or not (channel or all(map(is_ref, held))):
            raise ArgumentError(
                f"`parameters` of OptimizerInBackward must hold a jax.Ref for each of the variables, {treedef}, or be "
                f"a crossvjp.Overwrite of such arrays, but it is {self.parameters!r}."
            )


def _linearized_again(call: Any, variables: Any, y_bar: Any) -> Any:
    """Pulls `y_bar` back, linearising once it is there; the compiler may not merge this with the forward pass."""
    arrays, layout = take_apart((variables, call.inputs, call.keywords, y_bar))
    variables, inputs, keywords, y_bar = layout.fill(jax.lax.optimization_barrier(arrays))
    _, pullback = call.vjp_at(variables, *inputs, **keywords)
    return pullback(y_bar)


def _batch_size(arrays: list[Any], author: Rule) -> int:
    sizes = {array.shape[:1] for array in arrays}
    if len(sizes) != 1 or () in sizes:
        raise ArgumentError(
            f"{author!r} needs inputs whose arrays all have the batch on axis 0, but their shapes are "
            f"{[array.shape for array in arrays]}. Pass by keyword what belongs to every example."
        )
    ((size,),) = sizes
    return size


def _split(inputs: Any, parts: int, author: Rule) -> tuple[list[Any], Layout]:
    """Cuts the inputs' arrays along the batch, which becomes the second axis."""
    arrays, layout = take_apart(inputs)
    size = _batch_size(arrays, author)
    if size % parts:
        raise ArgumentError(f"The batch of {size} can't be cut into the {parts} equal parts of {author!r}.")
    return [_parted(array, parts) for array in arrays], layout


def _parted(array: Any, parts: int) -> Any:
    return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])


def _joined(array: Any) -> Any:
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _summed(function: Callable[[Any], tuple[Any, Any]], parts: Any) -> tuple[Any, Any]:
    """Scans a function over parts; sums its first results, at least in float32, and stacks the second."""
    types, _ = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda t: jnp.zeros_like(t, jnp.promote_types(t.dtype, jnp.float32)), types)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        one, rest = function(part)
        return add(total, one), rest

    total, stacked = jax.lax.scan(step, zeros, parts)
    return jax.tree.map(lambda leaf, t: leaf.astype(t.dtype), total, types), stacked
