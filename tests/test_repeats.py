"""Calls that repeat within one trace share a program, and each is still the call that it is."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import is_coming

import crossvjp as cv
from crossvjp import _repeats, _transform, rules
from crossvjp.testing import assert_close

pytestmark = pytest.mark.skipif(is_coming(), reason="with JAX's coming custom_vjp each call is traced by itself")
DEPTH, WIDTH = 6, 3
Use = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one framework that are alike: `run(params, use, x)` calls `use(layer, x)` for each."""

    params: Any
    run: Callable[[Any, Use, Any], Any]

    def loss(self, use: Use) -> Callable[[Any, Any], Any]:
        return lambda params, x: jnp.sum(jnp.sin(self.run(params, use, x)))


def plain_stack() -> Stack:
    def layer(params, x):
        return x @ params["w"] + params["b"]

    def run(params, use, x):
        for own in params:
            x = use(jax.tree_util.Partial(layer, own), x)
        return x

    return Stack([{"w": weights(i), "b": jnp.ones(WIDTH) * i} for i in range(DEPTH)], run)


class Linen(nn.Module):
    """Calls each layer through `use`."""

    use: Use

    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            x = self.use(nn.Dense(WIDTH), x)
        return x


def linen_stack() -> Stack:
    params = Linen(call).init(jax.random.key(0), some_input())
    return Stack(params, lambda params, use, x: Linen(use).apply(params, x))


def nnx_stack() -> Stack:
    rngs = nnx.Rngs(0)
    layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])
    graphdef, params = nnx.split(layers)

    def run(params, use, x):
        for layer in nnx.merge(graphdef, params, copy=True):
            x = use(layer, x)
        return x

    return Stack(params, run)


def haiku_stack() -> Stack:
    def transformed(use):
        def forward(x):
            for _ in range(DEPTH):
                x = use(hk.Linear(WIDTH), x)
            return x

        return hk.without_apply_rng(hk.transform(forward))

    params = transformed(call).init(jax.random.key(0), some_input())
    return Stack(params, lambda params, use, x: transformed(use).apply(params, x))


def equinox_stack() -> Stack:
    layers = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in jax.random.split(jax.random.key(0), DEPTH)]
    params, static = eqx.partition(layers, eqx.is_array)

    def run(params, use, x):
        for layer in eqx.combine(params, static):
            x = use(lambda x, layer=layer: layer(x), x) if use is call else use(layer, x)
        return x

    return Stack(params, run)


def call(mdl, *args):
    """Calls the layer without a rule."""
    return mdl(*args)


def weights(seed: int) -> Any:
    return jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH))


def some_input() -> Any:
    return jnp.array([1.0, -2.0, 0.5])


STACKS = {"plain": plain_stack, "linen": linen_stack, "nnx": nnx_stack, "haiku": haiku_stack, "equinox": equinox_stack}


@cv.rule
def doubled(called, y_bar):
    """Doubles the gradient of the variables."""
    bar = called.pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda g: 2 * g, bar.variables))


def under(rule: cv.Rule) -> Use:
    return lambda mdl, *args: rule(mdl)(*args)


def forward(mdl, x):
    return cv.vjp(call, mdl, x)


def backward(pullback, y_bar):
    x_bar, variables_bar = pullback(y_bar)
    return x_bar, jax.tree.map(lambda g: 2 * g, variables_bar)


USES = {"rule": under(doubled), "custom_vjp": cv.custom_vjp(call, forward, backward)}


@pytest.fixture(params=STACKS)
def stack(request) -> Stack:
    return STACKS[request.param]()


@pytest.fixture
def alone(monkeypatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs without sharing."""

    def run(function):
        with monkeypatch.context() as patched:
            patched.setattr(_transform, "in_program", lambda arrays: False)
            jax.clear_caches()
            return function()

    return run


def programs(loss: Callable[..., Any], *args: Any) -> list[Any]:
    """Lists, for the calls that are made by a program, which program it is."""
    closed = jax.make_jaxpr(loss)(*args)
    return [id(eqn.params["jaxpr"]) for eqn in closed.jaxpr.eqns if "custom_vjp" in str(eqn.params.get("jaxpr", ""))]


@pytest.mark.parametrize("use", USES)
def test_the_second_call_and_all_after_it_are_one_program(stack, use, request):
    found = programs(stack.loss(USES[use]), stack.params, some_input())
    if use == "custom_vjp" and "haiku" in request.node.name:  # its modules differ by name, and a pair can't be compared
        assert not found
    else:
        assert len(found) == DEPTH - 1
        assert len(set(found)) == 1


def test_functions_under_jit_are_traced_once_for_all_passes_of_all_calls():
    """Where JAX runs a part of a program again, it would take them for others than outside."""
    traced = []

    @jax.jit
    def product(w, x):
        traced.append(w)
        return x @ w

    def loss(params, x):
        for w in params:
            x = under(doubled)(jax.tree_util.Partial(product, w), x)
        return jnp.sum(x)

    jax.make_jaxpr(jax.grad(loss))([weights(index) for index in range(DEPTH)], some_input())
    assert len(traced) == 1


AROUND = {
    "jit": lambda grad: jax.jit(grad),
    "jit inside": lambda grad: lambda params, x: grad(params, x),
    "vmap": lambda grad: jax.jit(jax.vmap(grad, in_axes=(None, 0))),
    "remat": lambda grad: jax.jit(grad),
    "scan": lambda grad: jax.jit(lambda params, x: jax.lax.map(lambda x: grad(params, x), x)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("around", AROUND)
def test_gradients_are_those_of_calls_that_share_nothing(stack, use, around, alone):
    loss = stack.loss(USES[use])
    loss = {"remat": jax.checkpoint, "jit inside": jax.jit}.get(around, lambda loss: loss)(loss)
    x = jnp.stack([some_input(), 2 * some_input()]) if around in ("vmap", "scan") else some_input()
    run = lambda: AROUND[around](jax.value_and_grad(loss, argnums=(0, 1)))(stack.params, x)
    assert_close(run(), alone(run))


def test_the_gradient_by_the_rule_is_the_documented_one(stack):
    """Twice that of the plain layers, whose own inputs' gradients stay."""
    own = jax.jit(jax.grad(stack.loss(call)))(stack.params, some_input())
    bars = jax.jit(jax.grad(stack.loss(under(doubled))))(stack.params, some_input())
    assert_close(bars, jax.tree.map(lambda g: 2 * g, own))


class Scaled(cv.Rule):
    """Scales the gradient of the variables by a traced and by a static factor."""

    traced: Any
    static: float = cv.static(default=1.0)

    def backward(self, call, y_bar):
        """Scales."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: self.traced * self.static * g, bar.variables))


@pytest.mark.parametrize("statics", [[1.0] * DEPTH, [1.0, 2.0] * 3], ids=["traced", "static too"])
def test_each_rule_keeps_its_fields(stack, statics):
    def use(factors):
        rest = iter(zip(factors, statics, strict=True))
        return lambda mdl, x: Scaled(*next(rest))(mdl)(x)

    factors = jnp.arange(1.0, DEPTH + 1)
    bars = jax.jit(lambda params, f, x: jax.grad(stack.loss(use(list(f))))(params, x))(
        stack.params, factors, some_input()
    )
    own = jax.grad(stack.loss(call))(stack.params, some_input())
    per_layer = [f * s for f, s in zip(factors, statics, strict=True)]
    layers = lambda tree: [np.concatenate([np.ravel(leaf) for leaf in layer]) for layer in by_layer(tree)]
    for bar, gradient, factor in zip(layers(bars), layers(own), per_layer, strict=True):
        assert_close(bar, factor * gradient, rtol=1e-5)


def by_layer(tree: Any) -> list[list[Any]]:
    """Cuts the leaves of a stack's tree into layers; numbers in names are in order up to ten."""
    leaves = jax.tree.leaves(tree)
    return [leaves[index : index + 2] for index in range(0, len(leaves), 2)]


def test_a_rule_that_looks_at_names_is_not_taken_for_another(alone):
    """In Haiku the names of modules are in the variables."""

    @cv.rule
    def by_name(called, y_bar):
        bar = called.pullback(y_bar)
        factor = {"linear_3": 5.0}.get(next(iter(bar.variables)), 1.0)
        return bar.replace(variables=jax.tree.map(lambda g: factor * g, bar.variables))

    stack = haiku_stack()
    own = jax.grad(stack.loss(call))(stack.params, some_input())
    bars = jax.jit(jax.grad(stack.loss(under(by_name))))(stack.params, some_input())
    assert_close(bars, {**own, "linear_3": jax.tree.map(lambda g: 5 * g, own["linear_3"])})
    assert len(set(programs(stack.loss(under(by_name)), stack.params, some_input()))) == 1  # for those that are alike


@cv.rule(reads_names=False)
def unnaming(called, y_bar):
    """Does the same, and says that it looks at no names."""
    return doubled.backward(called, y_bar)


UNNAMED = {"rule": under(unnaming), "custom_vjp": cv.custom_vjp(call, forward, backward, reads_names=False)}


@pytest.mark.parametrize("use", UNNAMED)
def test_in_haiku_what_does_not_look_at_names_is_made_once(use):
    stack = haiku_stack()
    found = programs(stack.loss(UNNAMED[use]), stack.params, some_input())
    assert len(found) == DEPTH - 1
    assert len(set(found)) == 1
    own = jax.jit(jax.grad(stack.loss(call)))(stack.params, some_input())
    bars = jax.jit(jax.grad(stack.loss(UNNAMED[use])))(stack.params, some_input())
    assert_close(bars, jax.tree.map(lambda g: 2 * g, own))


def test_a_composed_rule_looks_at_names_if_a_part_does():
    assert not cv.compose(unnaming, rules.SignGradient()).reads_names
    assert cv.compose(unnaming, doubled).reads_names


class Rated(hk.Module):
    """Holds what its own output does not depend on, and other modules or arrays."""

    def __init__(self, rate: Any, inner: hk.Linear | None = None, name: str | None = None):
        super().__init__(name=name)
        self.rate, self.inner = rate, [inner, self] if rate == "itself" else [inner]

    def __call__(self, x):
        """Calls another module, or a new one."""
        return (self.inner[0] or hk.Linear(WIDTH))(x)


def rated_forward(mdl, x):
    y, pullback = cv.vjp(call, mdl, x)
    return y, (mdl.rate if isinstance(mdl.rate, float) else 1.0, pullback)


def rated_backward(residuals, y_bar):
    rate, pullback = residuals
    x_bar, variables_bar = pullback(y_bar)
    return x_bar, jax.tree.map(lambda g: rate * g, variables_bar)


RATED = {  # what makes the modules, and how many of six calls are made by how many programs
    "equal": (lambda index: Rated(2.0), 5, 1),
    "in turns": (lambda index: Rated(1.0 + index % 2), 4, 2),
    "all different": (lambda index: Rated(1.0 + index), 0, 0),
    "with another inside": (lambda index: Rated(2.0, hk.Linear(WIDTH)), 0, 0),  # which is not below its name
    "with an array": (lambda index: Rated(jnp.ones(2)), 0, 0),
    "with itself": (lambda index: Rated("itself"), 0, 0),
}


@pytest.mark.parametrize("kind", RATED)
def test_in_haiku_modules_that_are_configured_in_another_way_are_told_apart(kind, alone):
    """By functions of a custom_vjp that reads a module's attribute."""
    make, calls, different = RATED[kind]
    use = cv.custom_vjp(call, rated_forward, rated_backward, reads_names=False)

    def model(use):
        def forward(x):
            for index in range(DEPTH):
                x = use(make(index), x)
            return jnp.sum(jnp.sin(x))

        return hk.without_apply_rng(hk.transform(forward))

    params = model(call).init(jax.random.key(0), some_input())
    run = lambda: jax.jit(jax.grad(model(use).apply))(params, some_input())
    assert_close(run(), alone(run))
    found = programs(model(use).apply, params, some_input())
    assert (len(found), len(set(found))) == (calls, different)


@pytest.mark.parametrize(
    "name", [name for name in dir(rules) if getattr(getattr(rules, name), "reads_names", True) is False]
)
def test_rules_that_say_so_do_not_look_at_names(name):
    rule = getattr(rules, name)()
    lifted = rule.lift(lambda params, x: x @ params[next(iter(params))]["w"], grad_vars=True)
    grad = jax.make_jaxpr(jax.grad(lambda params, x: jnp.sum(lifted(params, x)), argnums=(0, 1)))
    first, second = (str(grad({name: {"w": weights(0)}}, some_input())) for name in ("linear", "norm/~/scale"))
    assert first == second


class Flagged(nn.Module):
    """Reads a flag while it is traced, as modules do of their surroundings."""

    flag: types.SimpleNamespace

    @nn.compact
    def __call__(self, x):
        """Turns the sign of its output."""
        y = nn.Dense(WIDTH)(x)
        return -y if self.flag.on else y


class Flags(nn.Module):
    """Sets the flag for each of its layers."""

    use: Use
    flag: types.SimpleNamespace

    @nn.compact
    def __call__(self, x):
        """Calls the layers."""
        for on in (True, False, False, True, True, False, True):
            self.flag.on = on
            x = self.use(Flagged(self.flag), x)
        return x


def test_what_a_module_reads_of_its_surroundings_is_seen():
    flag = types.SimpleNamespace(on=True)
    params = Flags(call, flag).init(jax.random.key(0), some_input())
    run: Any = lambda use: lambda params: Flags(use, flag).apply(params, some_input())
    grad = lambda use: jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(run(use)(params)))))
    own, bars = grad(call)(params), grad(under(doubled))(params)
    assert_close(bars, jax.tree.map(lambda g: 2 * g, own))


def test_functions_of_the_same_types_are_told_apart():
    functions = [jnp.sin, jnp.cos, jnp.tanh, jnp.sin, jnp.cos, jnp.sin, jnp.tanh]
    reversal = cv.rule(lambda called, y_bar: called.pullback(-y_bar))

    def loss(x, use):
        for function in functions:
            x = use(function)(x)
        return x.sum()

    x = some_input()
    own = jax.grad(lambda x: loss(x, lambda function: function))(x)
    bars = jax.jit(
        jax.grad(lambda x: loss(x, lambda function: lambda x: reversal.lift(lambda _, x: function(x))(None, x)))
    )(x)
    assert_close(bars, -own)


def linen_block(use, mdl, x):
    x = use(nn.Dense(WIDTH), x)
    x = use(nn.BatchNorm(use_running_average=False), x)
    return use(nn.Dropout(0.5, deterministic=False), x)


class LinenNet(nn.Module):
    """Dense, BatchNorm and Dropout, again and again."""

    use: Use

    @nn.compact
    def __call__(self, x):
        """Calls each under the rule."""
        for _ in range(4):
            x = linen_block(self.use, self, x)
        return x


class NnxBlock(nnx.Module):
    """The three, called at once."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)

    def __call__(self, x):
        """Calls them."""
        return self.dropout(self.norm(self.linear(x)))


class HaikuBlock(hk.Module):
    """The three, called at once."""

    def __call__(self, x):
        """Calls them."""
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(WIDTH)(x), is_training=True)
        return hk.dropout(hk.next_rng_key(), 0.5, x)


def with_state_linen(use):
    net, rngs = LinenNet(use), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = LinenNet(call).init(rngs, rows())
    stats = variables["batch_stats"]
    run = lambda params, x: net.apply(
        {"params": params, "batch_stats": stats}, x, rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"]
    )
    return variables["params"], run


def with_state_nnx(use):
    rngs = nnx.Rngs(0)
    layers = nnx.List([NnxBlock(rngs) for _ in range(4)])
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    def run(params, x):
        mdl = nnx.merge(graphdef, params, rest, copy=True)
        for layer in mdl:
            x = use(layer, x)
        return x, nnx.state(mdl, nnx.Not(nnx.Param))

    return params, run


def with_state_haiku(use):
    def transformed(use):
        def forward(x):
            for _ in range(4):
                x = use(HaikuBlock(), x)
            return x

        return hk.transform_with_state(forward)

    params, state = transformed(call).init(jax.random.key(0), rows())
    return params, lambda params, x: transformed(use).apply(params, state, jax.random.key(2), x)


def rows() -> Any:
    return jnp.stack([some_input(), 2 * some_input(), jnp.cos(some_input())])


@pytest.mark.parametrize("model", [with_state_linen, with_state_nnx, with_state_haiku])
@pytest.mark.parametrize("rule", [doubled, unnaming], ids=["doubled", "unnaming"])
def test_state_and_masks_are_each_calls_own(model, rule):
    def results(use):
        params, run = model(use)

        def loss(params):
            y, state = run(params, rows())
            return jnp.sum(jnp.sin(y)), (y, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (value, aux), bars = results(under(rule))
    (own_value, own_aux), own = results(call)
    assert_close([value, *map(_raw, jax.tree.leaves(aux))], [own_value, *map(_raw, jax.tree.leaves(own_aux))])
    assert_close(bars, jax.tree.map(lambda g: 2 * g, own), rtol=1e-5)  # batch norms, one behind the other


def test_in_haiku_calls_that_write_state_share_a_program_too():
    params, run = with_state_haiku(under(unnaming))
    assert len(programs(lambda params: run(params, rows()), params)) == 3


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_a_rule_that_is_not_pure_is_traced_for_each_call(stack):
    counted = iter(range(1, 100))

    def backward(called, y_bar):
        bar = called.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: next(counted) * g, bar.variables))

    counting = cv.rule(backward, pure=False)
    assert not programs(stack.loss(under(counting)), stack.params, some_input())
    assert not programs(stack.loss(under(cv.compose(counting, doubled))), stack.params, some_input())
    assert programs(stack.loss(under(cv.compose(doubled, doubled))), stack.params, some_input())


def test_effects_happen_in_each_call(capfd):
    @jax.jit
    def run(x):
        for _ in range(4):
            x = doubled.lift(lambda _, x: (jax.debug.print("at {}", x[0]), x + 1)[1])(None, x)
        return x

    jax.block_until_ready(jax.grad(lambda x: run(x).sum())(some_input()))
    jax.effects_barrier()
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("at")] == [
        f"at {value}" for value in (1.0, 2.0, 3.0, 4.0)
    ]


def test_nothing_of_a_trace_is_kept(stack):
    with jax.checking_leaks():
        jax.jit(jax.grad(stack.loss(under(doubled))))(stack.params, some_input())


AT_ONCE = {
    "grad": lambda loss: jax.grad(loss),
    "vmap": lambda loss: lambda params, x: jax.vmap(loss, in_axes=(None, 0))(params, x[None]),
    "vmap of grad": lambda loss: lambda params, x: jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, x[None]),
}


@pytest.mark.parametrize("transform", AT_ONCE)
def test_what_is_computed_at_once_is_not_made_a_program(stack, transform, monkeypatch):
    """It would be compiled."""

    def refuse(*_):
        raise AssertionError("made a program")

    monkeypatch.setattr(_repeats, "_as_program", refuse)
    loss = stack.loss(under(doubled))
    AT_ONCE[transform](loss)(stack.params, some_input())
    with pytest.raises(AssertionError, match="made a program"):
        jax.jit(AT_ONCE[transform](loss))(stack.params, some_input())


def test_an_attached_rule_is_shared_too():
    """An attached rule has another function for each call; what it computes is compared."""
    attached: Any = cv.attach(Linen(call), doubled, where=nn.Dense)
    params = linen_stack().params
    loss = lambda params, x: jnp.sum(attached.apply(params, x))
    assert len(set(programs(loss, params, some_input()))) == 1
    assert len(programs(loss, params, some_input())) == DEPTH - 1
