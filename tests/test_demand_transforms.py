"""Users' needs about derivatives and transforms; tests/test_demand.py has the table of all needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from demand import each_framework, each_outer, gradients, scalar
from helpers import is_coming
from hosts import kernel_and_bias, the_input
from rules import f, fwd, identity, unchanged

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits


@each_outer
@each_framework
def test_row_7_the_cotangents_of_several_losses_go_to_different_parameters(host, outer):
    """One pullback over stacked cotangents: the first loss trains the kernel, the second the bias."""

    def backward(pullback, y_bar):
        first, second = y_bar
        bars = jax.vmap(pullback)(jnp.stack([first, second]))
        routed = jax.tree.map(lambda bar: bar[0] if bar.ndim == 3 else bar[1], bars.variables)
        return bars.replace(inputs=(None,), variables=routed)

    def forward(mdl, x):
        y, pullback = crossvjp.vjp(f, mdl, x)
        return (y, y), pullback

    use = crossvjp.custom_vjp(lambda mdl, x: (f(mdl, x), f(mdl, x)), forward, backward)
    losses = [lambda y: jnp.sum(jnp.sin(y)), lambda y: jnp.sum(y**3)]

    def both(params):
        heads = host.run(params, use, the_input())
        return losses[0](heads[0]) + losses[1](heads[1])

    kernel_bar, bias_bar = kernel_and_bias(outer(jax.grad, both)(host.params))
    own = [jax.grad(lambda params, loss=loss: loss(host.run(params, f, the_input())))(host.params) for loss in losses]
    assert_close(kernel_bar, kernel_and_bias(own[0])[0])
    assert_close(bias_bar, kernel_and_bias(own[1])[1])


def input_loss(host: Any, use: Any) -> Any:
    """A loss of the input alone, whose second derivative is small enough to print."""
    return lambda x: host.run(host.params, scalar(use), x)


HESSIANS = {
    "forward over reverse": (jax.hessian, identity.lift(f)),
    "reverse over reverse": (lambda fun: jax.jacrev(jax.jacrev(fun)), crossvjp.custom_vjp(f, fwd, unchanged)),
    "of jit": (lambda fun: jax.hessian(jax.jit(fun)), identity.lift(f)),
}


@pytest.mark.parametrize(("hessian", "use"), HESSIANS.values(), ids=HESSIANS)
@each_framework
def test_row_18_the_hessian_of_a_rule_is_the_derivative_of_its_backward_pass(host, use, hessian):
    assert_close(hessian(input_loss(host, use))(the_input()), jax.hessian(input_loss(host, f))(the_input()))


@each_framework
def test_row_18_a_rule_that_changes_the_gradient_changes_the_hessian_with_it(host):
    halve = crossvjp.rule(lambda call, y_bar: jax.tree.map(lambda leaf: leaf / 2, call.pullback(y_bar)))
    got = jax.hessian(input_loss(host, halve.lift(f)))(the_input())
    assert_close(got, jax.hessian(input_loss(host, f))(the_input()) / 2)


FORWARD_MODE = {
    "jvp": lambda loss, x: jax.jvp(loss, (x,), (x,)),
    "linearize": lambda loss, x: jax.linearize(loss, x)[1](x),
    "jacfwd": lambda loss, x: jax.jacfwd(loss)(x),
}


@pytest.mark.parametrize("derivative", FORWARD_MODE.values(), ids=FORWARD_MODE)
@each_framework
def test_row_18_forward_mode_through_a_rule_is_an_error_and_not_the_derivative_of_another_function(host, derivative):
    refused: Any = (TypeError, r"can't apply forward-mode autodiff \(jvp\) to a custom_vjp function")
    if is_coming() and derivative is FORWARD_MODE["linearize"]:
        # JAX's own refusal: its coming custom_vjp has no linearize.
        refused = (NotImplementedError, r"for linearize support, .* must implement `lin` and `linearized`")
    error, words = refused
    with pytest.raises(error, match=words):
        derivative(input_loss(host, identity.lift(f)), the_input())


class Counted:
    """Functions of the host machine that count how often the compiled program calls them.

    Each gives two results at once, so that a run that needs only one of them is a whole run.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []

    def on_host(self, name: str, y: Any) -> tuple[Any, Any]:
        """Gives `y` twice."""

        def note(y: Any) -> tuple[Any, Any]:
            self.ran.append(name)
            return np.asarray(y), np.asarray(y)

        type_ = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return jax.pure_callback(note, (type_, type_), y, vmap_method="sequential")

    def use(self, **options: Any) -> Any:
        """A function of a module, and a forward function that gets its residual in the same run."""

        def fn(mdl, x):
            return self.on_host("fn", jnp.zeros(3))[0] + mdl(x)

        def forward(mdl, x):
            y, pullback = crossvjp.vjp(f, mdl, x)
            first, second = self.on_host("forward_fn", jnp.zeros(3))
            return y + first, (pullback, second)

        def backward(residuals, y_bar):
            pullback, zero = residuals
            return pullback(y_bar + zero)

        return crossvjp.custom_vjp(fn, forward, backward, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"optimize_remat": True}, ["fn", "forward_fn"]), ({}, ["forward_fn", "forward_fn"])],
    ids=["optimised", "not"],
)
@each_framework
def test_row_21_remat_does_not_run_the_forward_function_twice_if_asked(host, options, expected):
    counted = Counted()
    use = counted.use(**options)
    loss = jax.checkpoint(lambda params, x: host.run(params, scalar(use), x))
    bars = jax.grad(loss, argnums=(0, 1))(host.params, the_input())
    assert_close(bars, gradients(host, f))
    assert counted.ran == expected


@pytest.mark.parametrize("outer", [jax.grad, lambda loss: jax.jit(jax.grad(loss))], ids=["grad", "jit_grad"])
@each_framework
def test_row_21_optimised_remat_changes_nothing_without_remat(host, outer):
    counted = Counted()
    use = counted.use(optimize_remat=True)
    bars = outer(lambda params: host.run(params, scalar(use), the_input()))(host.params)
    assert_close(bars, gradients(host, f)[0])
    assert counted.ran == ["forward_fn"]


@each_outer
@each_framework
def test_row_26_a_batch_inside_the_rule_is_one_call_of_the_backward_pass(host, outer):
    """Per-example gradients and what mixes them: here the parameters' gradient has the batch's median norm."""
    calls: list[Any] = []

    @crossvjp.rule
    def median_norm(call, y_bar):
        calls.append(call.inputs[0].shape)
        bar = call.pullback(y_bar)
        norms = jnp.linalg.norm(call.inputs[0], axis=1)
        return bar.replace(variables=jax.tree.map(lambda leaf: jnp.median(norms) * leaf, bar.variables))

    xs = jnp.stack([the_input(), 3 * the_input(), 10 * the_input()])
    batched = lambda mdl, xs: jax.vmap(lambda x: mdl(x))(xs)
    loss = lambda use: lambda params: jnp.sum(jnp.sin(host.run(params, use, xs)))
    got = outer(jax.grad, loss(median_norm.lift(batched)))(host.params)
    own = jax.grad(loss(batched))(host.params)
    median = float(3 * jnp.linalg.norm(the_input()))
    assert_close(got, jax.tree.map(lambda leaf: median * leaf, own))
    assert set(calls) == {(3, 2)}


@each_framework
def test_row_26_outside_of_the_rule_each_example_has_a_call_of_its_own(host):
    calls: list[Any] = []

    @crossvjp.rule
    def look(call, y_bar):
        calls.append(call.inputs[0].shape)
        return call.pullback(y_bar)

    xs = jnp.stack([the_input(), 2 * the_input()])
    loss = lambda params: jax.vmap(lambda x: host.run(params, look.lift(f), x).sum())(xs).sum()
    jax.grad(loss)(host.params)
    assert set(calls) == {(2,)}


@each_outer
@each_framework
def test_row_27_a_backward_pass_runs_for_a_cotangent_of_zeros_and_may_regularise(host, outer):
    """An extra output, whose value is zero and on which the loss depends, keeps the backward pass awake."""

    def backward(residuals, y_bar):
        variables, pullback = residuals
        y_bar, awake = y_bar
        bar = pullback(y_bar)
        regularised = jax.tree.map(lambda leaf, w: leaf + awake * 0.1 * w, bar.variables, variables)
        return bar.replace(variables=regularised)

    def forward(mdl, x):
        y, pullback = crossvjp.vjp(f, mdl, x)
        return (y, jnp.zeros(())), (crossvjp.variables(mdl), pullback)

    use = crossvjp.custom_vjp(lambda mdl, x: (f(mdl, x), jnp.zeros(())), forward, backward)

    def loss(params):
        y, regularisation = host.run(params, use, the_input())
        return 0.0 * jnp.sum(y) + regularisation

    assert_close(outer(jax.grad, loss)(host.params), jax.tree.map(lambda leaf: 0.1 * leaf, host.params))


def step(mdl: Any, z: Any, x: Any) -> Any:
    """A contraction in `z`, for kernels of the size that initialisers give."""
    return 0.25 * jnp.tanh(mdl(z)[:2]) + x


def fixed_point(mdl: Any, x: Any) -> Any:
    """Iterates the step. Its first run, outside of the loop, creates the parameters where that is due."""
    return jax.lax.while_loop(lambda c: c[1] < 60, lambda c: (step(mdl, c[0], x), c[1] + 1), (step(mdl, x, x), 0))[0]


def forward_of_fixed_point(mdl: Any, x: Any) -> Any:
    z = fixed_point(mdl, x)
    return z, crossvjp.vjp(step, mdl, z, x)[1]


def implicit(pullback: Any, z_bar: Any) -> Any:
    """Solves `u = z_bar + u @ dstep/dz` by iteration, and pulls the solution back."""
    u = jax.lax.fori_loop(0, 60, lambda _, u: z_bar + pullback(u).inputs[0], z_bar)
    _, x_bar, variables_bar = pullback(u)
    return x_bar, variables_bar


implicit_layer = crossvjp.custom_vjp(fixed_point, forward_of_fixed_point, implicit)


def unrolled(mdl: Any, x: Any) -> Any:
    """The same fixed point by a loop that JAX differentiates."""
    z = x
    for _ in range(40):
        z = step(mdl, z, x)
    return z


def implicit_gradients(run: Any, params: Any, use: Any, outer: Any) -> Any:
    weights = jnp.array([1.0, -2.0])
    loss = lambda params, x: jnp.sum(run(params, use, x) * weights)
    return outer(lambda loss: jax.grad(loss, argnums=(0, 1)), loss)(params, the_input())


@each_outer
@each_framework
def test_row_30_an_implicit_layer_has_the_gradient_of_its_fixed_point(host, outer):
    got = implicit_gradients(host.run, host.params, implicit_layer, outer)
    own = implicit_gradients(host.run, host.params, unrolled, lambda grad, loss: grad(loss))
    assert_close(got, own, rtol=1e-5)  # two iterations to a fixed point, in float32


def linen_implicit() -> Any:
    class Net(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, x):
            return self.use(nn.Dense(3), x)

    init = lambda use: Net(use).init(jax.random.key(0), the_input())
    return init, lambda params, use, x: Net(use).apply(params, x)


def haiku_implicit() -> Any:
    transformed = hk.transform(lambda use, x: use(hk.Linear(3), x))
    init = lambda use: transformed.init(jax.random.PRNGKey(0), use, the_input())
    return init, lambda params, use, x: transformed.apply(params, None, use, x)


@pytest.mark.parametrize("make", [linen_implicit, haiku_implicit], ids=["linen", "haiku"])
def test_row_30_an_implicit_layer_creates_its_parameters(make):
    init, run = make()
    params = init(implicit_layer)
    assert_same_bits(params, init(lambda mdl, x: mdl(x)))
    eager = lambda grad, loss: grad(loss)
    got = implicit_gradients(run, params, implicit_layer, eager)
    assert_close(got, implicit_gradients(run, params, unrolled, eager), rtol=1e-5)


@pytest.mark.parametrize("outer", [lambda run: run, jax.jit], ids=["eager", "jit"])
@each_framework
def test_row_30_a_network_under_a_rule_is_the_right_hand_side_of_an_ode(host, outer):
    """Euler steps around a module that the solver's loop calls; the rule acts in every step."""
    clip = crossvjp.rule(lambda call, y_bar: jax.tree.map(lambda leaf: leaf / 2, call.pullback(y_bar)))

    def solve(wrap):
        def use(mdl, x):
            field = wrap(lambda mdl, y: jnp.tanh(mdl(y)[:2]))
            return jax.lax.scan(lambda y, _: (y + 0.1 * field(mdl, y), y), x, None, length=8)[0]

        return use

    def by_steps(mdl, x, factor):
        halve = jax.custom_vjp(lambda y: y)
        halve.defvjp(lambda y: (y, None), lambda _, bar: (factor * bar,))
        for _ in range(8):
            x = x + 0.1 * halve(jnp.tanh(mdl(x)[:2]))
        return x

    grad = lambda use: jax.grad(lambda params: host.run(params, use, the_input()) @ jnp.array([1.0, -2.0]))
    for wrap, factor in ((identity.lift, 1.0), (clip.lift, 0.5)):
        expected = grad(lambda mdl, x, factor=factor: by_steps(mdl, x, factor))(host.params)
        assert_close(outer(grad(solve(wrap)))(host.params), expected)
