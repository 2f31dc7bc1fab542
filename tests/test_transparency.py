"""A wrapped module is the unwrapped one: values, masks, state and RNG streams bit for bit, under every transform."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, one_by_one
from rules import WRAPS, plain, sign_gradient
from worlds import World, block_inputs


def loss_of(world: World, wrap: Any) -> Any:
    """A scalar of the output, with everything else as auxiliary output."""

    def loss(params, x, rest):
        out, after = world.run({"params": params, "rest": rest}, x, wrap)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), (out, after)

    return loss


def eager(loss):
    return lambda params, x, rest: loss(params, x, rest)


def jit(loss):
    return jax.jit(loss)


def grad(loss):
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def jit_grad(loss):
    return jax.jit(grad(loss))


def grad_jit(loss):
    return grad(jax.jit(loss))


def vmap(loss):
    return lambda params, x, rest: jax.vmap(loss, (None, 0, None))(params, jnp.stack([x, 2 * x, x - 1]), rest)


def grad_vmap(loss):
    def total(params, x, rest):
        values, aux = vmap(loss)(params, x, rest)
        return values.sum(), aux

    return grad(total)


def vmap_grad(loss):
    return vmap(grad(loss))


def scan(loss):
    def run(params, x, rest):
        def step(carry, shift):
            value, aux = loss(params, x + shift, rest)
            return carry + value, aux

        return jax.lax.scan(step, 0.0, jnp.arange(3.0))

    return run


def grad_scan(loss):
    return grad(scan(loss))


def jit_grad_scan(loss):
    return jax.jit(grad_scan(loss))


def remat(loss):
    return grad(jax.checkpoint(loss))


def grad_jit_remat(loss):
    return grad(jax.jit(jax.checkpoint(loss)))


def is_differentiated(transform):
    return "grad" in transform.__name__ or transform is remat


TRANSFORMS = [
    eager,
    jit,
    grad,
    jit_grad,
    grad_jit,
    vmap,
    grad_vmap,
    vmap_grad,
    scan,
    grad_scan,
    jit_grad_scan,
    remat,
    grad_jit_remat,
]


def both(world: World, wrap: str, transform: Any) -> tuple[Any, Any]:
    """Runs the transformed loss with and without the wrapping."""
    args = world.variables["params"], block_inputs(), world.variables["rest"]
    return transform(loss_of(world, WRAPS[wrap]))(*args), transform(loss_of(world, plain))(*args)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("wrap", WRAPS)
def test_values_masks_state_and_rng_streams_are_the_unwrapped_modules_bit_for_bit(world, wrap, transform):
    wrapped, unwrapped = both(world, wrap, lambda loss: one_by_one(transform(loss)))
    if not is_differentiated(transform):
        assert_same_bits(wrapped, unwrapped)
        return
    (results, bars), (expected, expected_bars) = wrapped, unwrapped
    assert_same_bits(results, expected)
    if "vmap" in transform.__name__:  # the unwrapped gradient sums over lanes and rows at once
        assert_close(bars, expected_bars)
    else:
        assert_same_bits(bars, expected_bars)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("wrap", WRAPS)
def test_as_jax_runs_it_the_results_are_the_unwrapped_modules(world, wrap, transform):
    wrapped, unwrapped = both(world, wrap, transform)
    assert_close(wrapped, unwrapped)
    masks = [np.asarray(jax.tree.leaves(result)[1]) == 0 for result in (wrapped, unwrapped)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("transform", [eager, grad], ids=lambda transform: transform.__name__)
@pytest.mark.parametrize("wrap", WRAPS)
def test_eager_results_and_gradients_are_the_unwrapped_modules_bit_for_bit(world, wrap, transform):
    assert_same_bits(*both(world, wrap, transform))


@pytest.mark.parametrize("transform", [eager, grad, grad_jit, jit_grad], ids=lambda transform: transform.__name__)
def test_dropout_draws_another_mask_for_another_key(world, transform):
    rest = world.variables["rest"]
    other = jax.tree.map(_other_key, rest)
    run = transform(loss_of(world, WRAPS["rule"]))
    first = run(world.variables["params"], block_inputs(), rest)
    second = run(world.variables["params"], block_inputs(), other)
    masks = [np.asarray(jax.tree.leaves(result)[1]) == 0 for result in (first, second)]
    assert (masks[0] != masks[1]).any()


def _other_key(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(leaf)[0]
    return leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) else leaf


def test_the_comparison_catches_a_rule_that_changes_the_gradient(world):
    args = world.variables["params"], block_inputs(), world.variables["rest"]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(grad(loss_of(world, sign_gradient))(*args)[1], grad(loss_of(world, plain))(*args)[1])
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_bits(grad(loss_of(world, sign_gradient))(*args)[1], grad(loss_of(world, plain))(*args)[1])


def test_the_rule_signs_the_parameters_and_leaves_the_inputs(world):
    args = world.variables["params"], block_inputs(), world.variables["rest"]
    _, (params_bar, x_bar) = grad(loss_of(world, sign_gradient))(*args)
    _, (own_params_bar, own_x_bar) = grad(loss_of(world, plain))(*args)
    assert_same_bits(params_bar, jax.tree.map(jnp.sign, own_params_bar))
    assert_same_bits(x_bar, own_x_bar)
