"""Training with few bits: the papers' own forms by autodiff, hand-read figures, statistics of many draws."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import HOSTS, Host

import crossvjp as cv
from crossvjp.rules import LSQ, PACT, DoReFa, OnKernels, SignSTE
from crossvjp.testing import assert_close, assert_same_bits


def identity(x):
    return x


def detach(x):
    return jax.lax.stop_gradient(x)


def gradscale(x, scale):
    return detach(x - x * scale) + x * scale


def roundpass(x):
    return detach(jnp.round(x) - x) + x


def pseudo_code(v, s, bits, activation):
    """Quantises as the paper's appendix on implementation does, by autodiff."""
    low, high = (0, 2**bits - 1) if activation else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    size = v[0].size if activation else v.size
    s = gradscale(s, 1 / np.sqrt(size * high))
    return roundpass(jnp.clip(v / s, low, high)) * s


@pytest.mark.parametrize("activation", [False, True], ids=["weights", "activation"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_is_the_papers_pseudo_code(bits, activation):
    with jax.enable_x64(True):  # the step's gradient is a sum in which most cancels
        v, c = jax.random.normal(jax.random.key(0), (2, 16, 32))
        step = jnp.array(3.0 / 2**bits)  # some of the numbers are clipped at each width
        y, pullback = jax.vjp(lambda v, step: LSQ(step, bits, activation)(identity)(v), v, step)
        expected, expected_pullback = jax.vjp(lambda v, step: pseudo_code(v, step, bits, activation), v, step)
        assert_same_bits(y, expected)
        v_bar, step_bar = pullback(c)
        expected_v, expected_step = expected_pullback(c)
        np.testing.assert_allclose(v_bar, expected_v, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(step_bar, expected_step, rtol=1e-12)
        assert 0.1 < float(jnp.mean(v_bar == 0)) < 0.9


@pytest.mark.parametrize(
    ("v", "height"),
    [
        (-0.7, 0.0),
        (0.25, -0.25),
        (0.49, -0.49),
        (0.51, 0.49),
        (1.0, 0.0),
        (1.49, -0.49),
        (1.51, 0.49),
        (2.25, -0.25),
        (2.75, 0.25),
        (3.2, 3.0),
        (9.0, 3.0),
    ],
)
def test_the_steps_gradient_is_the_sawtooth_of_the_papers_figure(v, height):
    quantise = lambda step: LSQ(step, bits=2, activation=True)(identity)(jnp.array([v]))[0]
    # The figure is without the factor 1 / sqrt(N Q_P), which is 1 / sqrt(3) here.
    assert float(jax.grad(quantise)(1.0) * np.sqrt(3)) == pytest.approx(height, abs=1e-6)


@pytest.mark.parametrize("host", HOSTS.values(), ids=repr)
def test_the_steps_gradient_is_the_same_in_every_framework(host: Host):
    kernel, x, c = jnp.array([[0.4, -1.3, 0.2], [-0.2, 0.5, 1.7]]), jnp.array([1.0, -2.0]), jnp.array([1.0, -0.5, 2.0])
    turned = lambda leaf: kernel if leaf.shape == kernel.shape else kernel.T if leaf.ndim == 2 else leaf
    params = jax.tree.map(turned, host.params)

    def loss(step, params):
        return host.run(params, lambda mdl, x: OnKernels(LSQ(step, bits=3))(mdl)(x), x) @ c

    step_bar, params_bar = jax.grad(loss, argnums=(0, 1))(jnp.array(0.3), params)
    quantised = lambda step: pseudo_code(kernel, step, 3, False)
    expected = jax.grad(lambda step: x @ quantised(step) @ c)(jnp.array(0.3))
    assert_close(step_bar, expected)
    bias_bar = next(leaf for leaf in jax.tree.leaves(params_bar) if leaf.ndim == 1)
    assert_close(bias_bar, c)


def test_variables_outside_grad_vars_have_the_derivative_of_the_quantised_module():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (3, 4)), "out": jax.random.normal(keys[1], (4, 2)), "b": jnp.ones(4)}
    x, step = jax.random.normal(keys[2], (5, 3)), jnp.array(0.5)

    def net(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"]

    def detached(params, x, step):
        return net({**params, "w": pseudo_code(params["w"], step, 3, False)}, x)

    ruled = lambda params, x, step: OnKernels(LSQ(step, bits=3)).lift(net, grad_vars="w")(params, x)
    grads = lambda run: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.cos(run(*args))), argnums=(0, 1, 2)))
    assert_close(grads(ruled)(params, x, step), grads(detached)(params, x, step), 1e-5)  # a matrix product in float32


def test_binary_kernels_of_a_module_have_the_gradient_of_their_detached_form():
    layer = nn.Conv(4, (3,))
    x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    variables = jax.tree.map(lambda leaf: 3 * leaf, layer.init(jax.random.key(1), x))
    kernel = variables["params"]["kernel"]
    assert 0 < float(jnp.mean(jnp.abs(kernel) > 1)) < 1

    def detached(variables, x):
        saturated = jnp.clip(variables["params"]["kernel"], -1, 1)
        binary = saturated + detach(jnp.sign(saturated) - saturated)
        return layer.apply({"params": {**variables["params"], "kernel": binary}}, x)

    ruled = lambda variables, x: OnKernels(SignSTE(), jnp.sign)(layer.bind(variables))(x)
    grads = lambda run: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.cos(run(*args))), argnums=(0, 1)))
    assert_close(grads(ruled)(variables, x), grads(detached)(variables, x))


def test_a_step_that_is_the_modules_parameter_learns():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = self.param("step", nn.initializers.constant(2.0), ())
            return OnKernels(LSQ(step, bits=4))(nn.Dense(8, use_bias=False, name="dense"))(x)

    x = jnp.eye(8)
    variables = Layer().init(jax.random.key(0), x)
    kernel = jnp.asarray(variables["params"]["dense"]["kernel"])

    def loss(step):
        quantised = jnp.asarray(Layer().apply({"params": {"step": step, "dense": {"kernel": kernel}}}, x))
        return jnp.mean((quantised - kernel) ** 2)

    step = variables["params"]["step"]
    first = loss(step)
    descend = jax.jit(lambda step: step - 2.0 * jax.grad(loss)(step))
    for _ in range(300):
        step = descend(step)
    steps = jnp.linspace(0.01, 0.5, 500)
    assert float(loss(step)) < 1.5 * float(jnp.min(jax.lax.map(loss, steps))) < float(first) / 10


def clipped(alpha, h):
    return (jnp.abs(h) - jnp.abs(h - alpha) + alpha) / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pact_has_the_gradient_of_the_papers_clipping_function(bits):
    h, c = jax.random.normal(jax.random.key(0), (2, 64)) * 2
    alpha = jnp.array(1.5)
    y, pullback = jax.vjp(lambda alpha, h: PACT(alpha, bits)(identity)(h), alpha, h)
    expected, expected_pullback = jax.vjp(clipped, alpha, h)
    assert_close(pullback(c), expected_pullback(c), 1e-5)  # a sum over 64 numbers in float32
    assert float(jnp.max(jnp.abs(y - expected))) <= 1.5 / (2**bits - 1) / 2 + 1e-6  # half a step
    assert len(np.unique(np.asarray(y))) <= 2**bits


def test_pact_takes_the_place_of_a_relu_behind_a_module():
    dense = nn.Dense(3)
    x = jax.random.normal(jax.random.key(1), (8, 2))
    variables = dense.init(jax.random.key(0), x)
    alpha = jnp.array(0.3)

    def grads(act):
        weights = jnp.cos(jnp.arange(24.0)).reshape(8, 3)
        loss = lambda variables, alpha: jnp.sum(weights * act(dense.bind(variables), alpha))
        return jax.grad(loss, argnums=(0, 1))(variables, alpha)

    h = dense.apply(variables, x)
    assert len(np.unique(np.digitize(np.asarray(h), [0, 0.3]))) == 3  # below, inside and above
    found = grads(lambda mdl, alpha: PACT(alpha)(mdl)(x))
    assert_close(found, grads(lambda mdl, alpha: clipped(alpha, mdl(x))))


C = np.array([[0.9, -0.31, 0.0034, 0.5], [1e-3, -4e-4, 7e-4, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)


def quantised_gradient(bits, key, dtype=jnp.float32):
    return jax.vjp(DoReFa(bits)(identity, key=key), jnp.zeros(C.shape, dtype))[1](jnp.asarray(C, dtype))[0]


@pytest.mark.parametrize(("bits", "dtype"), [(1, "float32"), (2, "float32"), (4, "float32"), (4, "bfloat16")])
def test_the_quantised_gradient_has_no_bias(bits, dtype):
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = np.asarray(jax.jit(jax.vmap(lambda key: quantised_gradient(bits, key, dtype)))(keys), np.float64)
    error = np.abs(found.mean(0) - np.asarray(jnp.asarray(C, dtype), np.float64))
    rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(found).mean(0)  # of the levels themselves
    assert np.all(error <= 5 * found.std(0) / np.sqrt(len(keys)) + rounding)  # five standard errors


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_each_example_has_its_own_few_levels(bits):
    found = np.asarray(quantised_gradient(bits, jax.random.key(0)))
    largest = np.abs(C[:2]).max(1, keepdims=True)
    levels = (found[:2] / largest + 1) / 2 * (2**bits - 1)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-5)  # float32
    assert np.abs(levels - (C[:2] / largest + 1) / 2 * (2**bits - 1)).max() < 1
    assert not found[2].any()


def test_a_gradient_without_a_key_is_refused():
    with pytest.raises(cv.ArgumentError, match="has no key"):
        jax.grad(lambda x: DoReFa()(identity)(x).sum())(jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LSQ(0.0), "step"),
        (lambda: LSQ(1.0, bits=1), "bits"),
        (lambda: LSQ(1.0, bits=0, activation=True), "bits"),
        (lambda: PACT(-1.0), "alpha"),
        (lambda: PACT(1.0, bits=0), "bits"),
        (lambda: DoReFa(bits=0), "bits"),
    ],
)
def test_numbers_out_of_range_are_refused(make, match):
    with pytest.raises(cv.ArgumentError, match=match):
        make()


def test_a_vector_is_no_kernel():
    with pytest.raises(cv.ArgumentError, match=r"OnKernels\(rule=LSQ\(.*the variables have the shapes \[\(3,\)\]"):
        OnKernels(LSQ(0.5)).lift(lambda w: w)(jnp.ones(3))
