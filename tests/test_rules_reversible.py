"""Reversible networks against autodiff: the gradient, and that what is kept does not grow with depth."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five import five
from flax import nnx
from memory_use import kept_bytes, temporary_bytes

import crossvjp as cv
from crossvjp.rules import ReversibleBlock, ReversibleStack
from crossvjp.testing import CheckError, check_rule

WIDTH = 64


def coupling(p, x1, x2):
    return x2, x1 + 0.5 * jnp.tanh(x2 @ p["w"] + p["b"])


def stack(blocks, x1, x2, layer=None):
    for p in blocks if layer is None else [blocks[layer]]:
        x1, x2 = coupling(p, x1, x2)
    return x1, x2


def chain(blocks, x1, x2):
    road = cv.Highway((x1, x2))
    for p in blocks:
        x1, x2, road = ReversibleBlock().lift(lambda p, x1, x2, road: (*coupling(p, x1, x2), road))(p, x1, x2, road)
    return road.depart((x1, x2), primal=True)


def scanned(stacked, x1, x2):
    def step(carry, p):
        return ReversibleBlock().lift(lambda p, x1, x2, road: (*coupling(p, x1, x2), road))(p, *carry), None

    (x1, x2, road), _ = jax.lax.scan(step, (x1, x2, cv.Highway((x1, x2))), stacked)
    return road.depart((x1, x2), primal=True)


def by_stack(blocks, x1, x2):
    return ReversibleStack(len(blocks)).lift(stack)(blocks, x1, x2)


REVERSIBLE = {"stack": by_stack, "chain of blocks": chain}
each_network = pytest.mark.parametrize("network", REVERSIBLE.values(), ids=REVERSIBLE)
# In halves of the output: the stack keeps its output, the chain too, and as many zeros, which the highway starts with.
KEEPS = {by_stack: 2, chain: 4}


def make(depth, batch=8, width=WIDTH):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    blocks = [{"w": draw(width, width) / width**0.5, "b": draw(width)} for _ in range(depth)]
    return blocks, draw(batch, width), draw(batch, width)


def loss(network):
    return lambda *args: sum(jnp.sum(jnp.sin(part)) for part in network(*args))


def gradient(network, *args):
    return jax.jit(jax.grad(loss(network), range(len(args))))(*args)


def error(found, expected):
    """The largest difference of an array to another, in units of that array's largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


@each_network
@pytest.mark.parametrize("depth", [1, 16])
def test_a_reversible_network_has_the_gradient_of_autodiff(network, depth):
    args = make(depth)
    assert error(network(*args), stack(*args)) == 0
    assert error(gradient(network, *args), gradient(stack, *args)) < 1e-5  # activations found again, in float32


@each_network
def test_second_derivatives_are_those_of_the_network(network):
    blocks, x1, x2 = make(3, batch=1, width=3)
    hessian = lambda fn: jax.jit(jax.hessian(lambda x1: loss(fn)(blocks, x1, x2)))(x1)
    assert error(hessian(network), hessian(stack)) < 1e-5  # activations found again, in float32


def test_an_input_by_keyword_has_the_gradient_of_all_couplings():
    blocks, x1, x2 = make(3)

    def scaled(blocks, x1, x2, layer=None, *, by):
        return stack([p | {"b": p["b"] * by} for p in blocks], x1, x2, layer)

    bar = lambda fn: jax.grad(lambda by: loss(lambda *args: fn(*args, by=by))(blocks, x1, x2))(jnp.array(1.3))
    assert error(bar(ReversibleStack(3).lift(scaled)), bar(scaled)) < 1e-5  # activations found again, in float32


def test_a_scan_of_reversible_blocks_has_the_gradient_of_autodiff():
    blocks, x1, x2 = make(16)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    found, *inputs_bar = gradient(scanned, stacked, x1, x2)
    expected, *expected_inputs_bar = gradient(stack, blocks, x1, x2)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    assert error((found, inputs_bar), (expected, expected_inputs_bar)) < 1e-5  # as above


@each_network
def test_what_a_reversible_network_keeps_does_not_grow_with_depth(network):
    few, many = (kept_bytes(network, *make(depth)) for depth in (4, 64))
    half = 8 * WIDTH * 4
    assert few == many
    assert 2 * half <= many < KEEPS[network] * half + 64  # and some scalars
    plain = [kept_bytes(stack, *make(depth)) for depth in (4, 64)]
    assert plain[1] > 10 * plain[0] > 10 * half


def test_the_temporaries_of_a_scan_of_reversible_blocks_do_not_grow_with_depth():
    def shapes(depth):
        blocks, *x = make(1, batch=64)
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype), blocks[0])
        return stacked, *x

    def plain(stacked, x1, x2):
        return jax.lax.scan(lambda carry, p: (coupling(p, *carry), None), (x1, x2), stacked)[0]

    temporary = lambda network, depth: temporary_bytes(jax.grad(loss(network)), *shapes(depth))
    few, some, many = (temporary(scanned, depth) for depth in (4, 16, 64))
    half = 64 * WIDTH * 4
    assert many - few < 0.5 * half  # less than half of one activation for 60 blocks
    assert few <= some <= many
    assert temporary(plain, 64) - temporary(plain, 4) > 60 * half


def test_the_temporaries_of_a_reversible_stack_do_not_grow_with_depth():
    temporary = lambda network, depth: temporary_bytes(jax.grad(loss(network)), *make(depth, batch=64))
    half = 64 * WIDTH * 4
    assert temporary(by_stack, 24) - temporary(by_stack, 8) < half
    assert temporary(stack, 24) - temporary(stack, 8) >= 16 * half


def linen_stack():
    class Stack(nn.Module):
        def setup(self):
            self.blocks = [nn.Dense(4) for _ in range(3)]

        def __call__(self, x1, x2, layer=None):
            for block in self.blocks if layer is None else [self.blocks[layer]]:
                x1, x2 = x2, x1 + nn.tanh(block(x2))
            return x1, x2

    class Net(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, *x):
            return self.use(Stack())(*x)

    variables = Net(lambda mdl: mdl).init(jax.random.key(0), *[jnp.ones((2, 4))] * 2)
    return variables, lambda variables, use, *x: Net(use).apply(variables, *x)


def nnx_stack():
    class Stack(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)])

        def __call__(self, x1, x2, layer=None):
            for block in self.blocks if layer is None else [self.blocks[layer]]:
                x1, x2 = x2, x1 + jnp.tanh(block(x2))
            return x1, x2

    graphdef, variables = nnx.split(Stack())
    return variables, lambda variables, use, *x: use(nnx.merge(graphdef, variables, copy=True))(*x)


def haiku_stack():
    class Stack(hk.Module):
        def __call__(self, x1, x2, layer=None):
            for number in range(3) if layer is None else [layer]:
                x1, x2 = x2, x1 + jnp.tanh(hk.Linear(4, name=f"block{number}")(x2))
            return x1, x2

    net = hk.transform(lambda use, *x: use(Stack())(*x))
    variables = net.init(jax.random.PRNGKey(0), lambda mdl: mdl, *[jnp.ones((2, 4))] * 2)
    return variables, lambda variables, use, *x: net.apply(variables, None, use, *x)


def equinox_stack():
    class Stack(eqx.Module):
        blocks: list

        def __call__(self, x1, x2, layer=None):
            for block in self.blocks if layer is None else [self.blocks[layer]]:
                x1, x2 = x2, x1 + jnp.tanh(jax.vmap(block)(x2))
            return x1, x2

    model = Stack([eqx.nn.Linear(4, 4, key=jax.random.key(i)) for i in range(3)])
    return model, lambda model, use, *x: use(model)(*x)


STACKS = {"linen": linen_stack, "nnx": nnx_stack, "haiku": haiku_stack, "equinox": equinox_stack}


@pytest.mark.parametrize("make_stack", STACKS.values(), ids=STACKS)
def test_a_stack_of_modules_is_reversed_in_every_framework(make_stack):
    variables, run = make_stack()
    x1, x2 = (jax.random.normal(jax.random.key(i), (2, 4)) for i in (1, 2))
    under = lambda use: lambda variables, *x: run(variables, use, *x)
    found, expected = (gradient(under(use), variables, x1, x2) for use in (ReversibleStack(3), lambda mdl: mdl))
    assert len(jax.tree.leaves(found)) == 8
    assert error(found, expected) < 1e-5  # as above


class Dropping(nnx.Module):
    """A coupling with dropout."""

    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x1, x2, road):
        return x2, x1 + self.dropout(jnp.tanh(self.linear(x2))), road


def test_a_reversible_block_computes_its_dropout_mask_again():
    _, x1, x2 = make(1)
    graphdef, variables = nnx.split(Dropping())

    def twice(use):
        def network(variables, x1, x2):
            block = nnx.merge(graphdef, variables, copy=True)
            road = cv.Highway((x1, x2))
            for _ in range(2):
                x1, x2, road = use(block)(x1, x2, road)
            return road.depart((x1, x2), primal=True)

        return loss(network)

    found, expected = (jax.grad(twice(use), (1, 2))(variables, x1, x2) for use in (ReversibleBlock(), lambda mdl: mdl))
    assert error(found, expected) < 1e-5  # as above


def three(p, x1, x2, layer=None, scale=1.0):
    for w in p.values() if layer is None else [p[f"w{layer}"]]:
        x1, x2 = x2, scale * x1 + jnp.tanh(x2 @ w)
    return x1, x2


WRONG = {
    "a depth that is too small": (ReversibleStack(2), three),
    "couplings that do more than add": (ReversibleStack(3), lambda *args: three(*args, scale=0.9)),
}


@pytest.mark.parametrize(("rule", "fn"), WRONG.values(), ids=WRONG)
def test_a_stack_that_is_not_inverted_is_caught_by_check_rule(rule, fn):
    blocks, x1, x2 = make(3, batch=2, width=4)
    (plain, *_) = five({f"w{layer}": p["w"] for layer, p in enumerate(blocks)}, fn, (x1, x2))
    with pytest.raises(CheckError, match="the rule claims to be autodiff's gradient"):
        check_rule(rule, [plain])


def test_a_stack_without_depth_is_refused():
    with pytest.raises(cv.ArgumentError, match="`depth` of ReversibleStack must be >= 1, but is 0"):
        ReversibleStack(0)
