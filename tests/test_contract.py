"""The documentation of `flax.linen.custom_vjp`, sentence by sentence, on every kind of handle."""

from __future__ import annotations

import re
from typing import Any

import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hosts import HOSTS, Host, kernel_and_bias, the_input

import crossvjp
from crossvjp.testing import assert_close, assert_same_bits


def f(mdl, x):
    return mdl(x)


def fwd(mdl, x):
    return crossvjp.vjp(f, mdl, x)


def bwd(vjp_fn, y_t):
    input_t, params_t = vjp_fn(y_t)
    params_t = jax.tree_util.tree_map(jnp.sign, params_t)
    return input_t, params_t


sign_grad = crossvjp.custom_vjp(f, forward_fn=fwd, backward_fn=bwd)


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """Each kind of handle in turn."""
    return HOSTS[request.param]


def scalar(use: Any) -> Any:
    """Makes a scalar of a use's output, with weights of both signs."""
    return lambda mdl, *args: jnp.sum(use(mdl, *args) * jnp.array([1.0, -2.0, 3.0]))


def gradients(host: Host, use: Any, *args: Any) -> Any:
    """Differentiates with respect to the parameters and the input."""
    loss = lambda params, x: host.run(params, scalar(use), x, *args)
    return jax.grad(loss, argnums=(0, 1))(host.params, the_input())


def test_the_documented_example_signs_the_parameters_gradient_and_leaves_the_inputs_alone(host):
    params_bar, x_bar = gradients(host, sign_grad)
    own_params_bar, own_x_bar = gradients(host, f)
    assert_same_bits(params_bar, jax.tree.map(jnp.sign, own_params_bar))
    assert_same_bits(x_bar, own_x_bar)
    assert not np.array_equal(kernel_and_bias(params_bar)[0], kernel_and_bias(own_params_bar)[0])


@pytest.mark.parametrize("outer", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_the_example_gives_the_same_when_its_functions_run_late(host, outer):
    loss = outer(lambda params, x: host.run(params, scalar(sign_grad), x))
    assert_close(jax.grad(loss, argnums=(0, 1))(host.params, the_input()), gradients(host, sign_grad))


def test_fn_alone_runs_when_no_gradient_is_asked_for(host):
    ran: list[str] = []

    def noted(mdl, x):
        ran.append("fn")
        return f(mdl, x)

    def noted_fwd(mdl, x):
        ran.append("forward_fn")
        return fwd(mdl, x)

    use = crossvjp.custom_vjp(noted, noted_fwd, bwd)
    host.run(host.params, use, the_input())
    jax.jit(lambda params: host.run(params, use, the_input()))(host.params)
    assert set(ran) == {"fn"}
    gradients(host, use)
    assert "forward_fn" in ran


@pytest.mark.parametrize("grad_vars", ["params", ["params"], True], ids=str)
def test_all_parameters_are_chosen_by_name_by_list_and_by_true(host, grad_vars):
    vjp = lambda mdl, x: crossvjp.vjp(f, mdl, x, grad_vars=grad_vars)
    params_bar, _ = gradients(host, crossvjp.custom_vjp(f, vjp, bwd, grad_vars=grad_vars))
    assert_same_bits(params_bar, jax.tree.map(jnp.sign, gradients(host, f)[0]))


@pytest.mark.parametrize("kind", ["own word", "glob", "regex", "predicate", "leaf predicate"])
def test_a_filter_leaves_parameters_out_which_keep_their_own_gradient(host, kind):
    grad_vars = {
        "own word": host.kernel_only,
        "glob": "*[wlt]" if "equinox" in host.name else "*[wl]",
        "regex": re.compile("(kernel|weight|w)$"),
        "predicate": lambda path, leaf: path[-1] in ("kernel", "weight", "w"),
        "leaf predicate": lambda leaf: leaf.ndim == 2,
    }[kind]
    seen: list[Any] = []

    def backward(pullback, y_bar):
        bar = pullback(y_bar)
        seen.append(jax.tree.leaves(bar.variables))
        return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))

    forward = lambda mdl, x: crossvjp.vjp(f, mdl, x, grad_vars=grad_vars)
    params_bar, x_bar = gradients(host, crossvjp.custom_vjp(f, forward, backward, grad_vars=grad_vars))
    own_params_bar, own_x_bar = gradients(host, f)
    assert [leaf.ndim for leaf in seen[0]] == [2]
    assert_same_bits(kernel_and_bias(params_bar)[0], jnp.sign(kernel_and_bias(own_params_bar)[0]))
    assert_close(kernel_and_bias(params_bar)[1], kernel_and_bias(own_params_bar)[1])
    assert_same_bits(x_bar, own_x_bar)


def test_arguments_without_gradient_come_first_and_get_none(host):
    def scaled(mdl, x, how, scale):
        return mdl(x) * scale if how == "times" else mdl(x)

    def forward(mdl, x, how, scale):
        return crossvjp.vjp(lambda mdl, x: scaled(mdl, x, how, scale), mdl, x)

    got: list[Any] = []

    def backward(how, scale, pullback, y_bar):
        got.append((how, scale))
        return pullback(y_bar)

    use = crossvjp.custom_vjp(scaled, forward, backward, nondiff_argnums=(2, 3))

    def loss(params, scale):
        return host.run(params, scalar(use), the_input(), "times", scale)

    value, (params_bar, scale_bar) = jax.value_and_grad(loss, argnums=(0, 1))(host.params, jnp.array(10.0))
    assert got[0][0] == "times"
    assert float(scale_bar) == 0.0
    assert float(value) == pytest.approx(10 * float(host.run(host.params, scalar(f), the_input())), rel=1e-6)
    assert_close(params_bar, jax.tree.map(lambda bar: 10 * bar, gradients(host, f)[0]))


def test_the_pullback_is_a_residual_that_may_be_called_again(host):
    def backward(residuals, y_bar):
        pullback, note = residuals
        assert note == "kept"
        first, second = pullback(y_bar), pullback(2 * y_bar)
        return jax.tree.map(jnp.add, first, second)

    def forward(mdl, x):
        y, pullback = crossvjp.vjp(f, mdl, x)
        return y, (pullback, "kept")

    use = crossvjp.custom_vjp(f, forward, backward)
    expected = jax.tree.map(lambda bar: 3 * bar, gradients(host, f))
    assert_close(gradients(host, use), expected)
    late = jax.jit(lambda params, x: host.run(params, scalar(use), x))
    assert_close(jax.grad(late, argnums=(0, 1))(host.params, the_input()), expected)


def test_a_snapshot_of_the_variables_is_a_residual(host):
    def forward(mdl, x):
        return f(mdl, x), (crossvjp.variables(mdl), x)

    def backward(residuals, y_bar):
        snapshot, _ = residuals
        return None, jax.tree.map(lambda leaf: 7 * leaf, snapshot)

    use = crossvjp.custom_vjp(f, forward, backward)
    params_bar, x_bar = gradients(host, use)
    assert_same_bits(params_bar, jax.tree.map(lambda leaf: 7 * leaf, host.params))
    np.testing.assert_array_equal(x_bar, jnp.zeros(2))
    late = jax.grad(jax.jit(lambda params: host.run(params, scalar(use), the_input())))(host.params)
    assert_same_bits(late, params_bar)


def test_a_module_that_is_kept_for_the_backward_pass_is_an_error_not_a_stale_value(host):
    kept: list[Any] = []

    def forward(mdl, x):
        kept.append(mdl)
        return f(mdl, x), x

    def backward(x, y_bar):
        return None, jax.tree.map(lambda leaf: leaf * f(kept[-1], x).sum(), kept[-1])

    use = crossvjp.custom_vjp(f, forward, backward)
    if not host.is_reference:  # the handle is a value: it is the snapshot
        assert np.isfinite(kernel_and_bias(gradients(host, use)[0])[0]).all()
        return
    with pytest.raises(crossvjp.HandleError, match=r"not usable in the backward pass.*crossvjp\.variables\(mdl\)"):
        gradients(host, use)


def test_the_live_module_is_refused_in_the_backward_pass_too():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            backward = lambda x, y_bar: (dense(x)[:2], None)
            return crossvjp.custom_vjp(f, lambda mdl, x: (f(mdl, x), x), backward)(dense, x).sum()

    params = Net().init(jax.random.key(0), the_input())
    with pytest.raises(crossvjp.HandleError, match="Dense at /Dense_0 is not usable in the backward pass"):
        jax.grad(Net().apply)(params, the_input())


def test_a_returned_module_is_refused_where_it_is_a_reference(host):
    use = crossvjp.custom_vjp(f, lambda mdl, x: (f(mdl, x), mdl), lambda mdl, y_bar: (None, None))
    if host.name.startswith(("linen", "haiku m", "haiku with")):
        with pytest.raises(crossvjp.HandleError, match=r"module among its residuals.*crossvjp\.variables\(mdl\)"):
            gradients(host, use)
    else:  # elsewhere a module is a pytree, and as a residual a snapshot of itself
        assert_same_bits(gradients(host, use), jax.tree.map(jnp.zeros_like, (host.params, the_input())))


def test_code_written_for_todays_flax_runs_with_variables_first(host):
    def flax_fwd(mdl, x):
        return crossvjp.vjp(f, mdl, x, order="variables_first")

    def flax_bwd(vjp_fn, y_t):
        params_t, *inputs_t = vjp_fn(y_t)
        return jax.tree.map(jnp.sign, params_t), *inputs_t

    use = crossvjp.custom_vjp(f, flax_fwd, flax_bwd, order="variables_first")
    assert_same_bits(gradients(host, use), gradients(host, sign_grad))


def test_todays_flax_gives_the_same_for_the_same_code():
    def make(vjp, custom_vjp):
        def bwd(vjp_fn, y_t):
            params_t, *inputs_t = vjp_fn(y_t)
            assert set(params_t) == {"params"}
            return jax.tree.map(jnp.sign, params_t), *inputs_t

        return custom_vjp(f, forward_fn=lambda mdl, x: vjp(f, mdl, x), backward_fn=bwd)

    ours = make(
        lambda *args: crossvjp.vjp(*args, order="variables_first"),
        lambda *args, **kwargs: crossvjp.custom_vjp(*args, order="variables_first", **kwargs),
    )
    host = HOSTS["linen compact"]
    assert_same_bits(gradients(host, ours), gradients(host, make(nn.vjp, nn.custom_vjp)))


def test_todays_flax_signs_the_inputs_gradient_in_the_documented_example():
    """Pins the reason for `Cotangents`: if Flax turns its order round again, the README has to say so."""
    backward = lambda vjp_fn, y_t: bwd(vjp_fn, y_t)
    theirs = nn.custom_vjp(f, forward_fn=lambda mdl, x: nn.vjp(f, mdl, x), backward_fn=backward)
    host = HOSTS["linen compact"]
    params_bar, x_bar = gradients(host, theirs)
    own_params_bar, own_x_bar = gradients(host, f)
    assert_same_bits(params_bar, own_params_bar)
    assert_same_bits(x_bar, jnp.sign(own_x_bar))


def test_the_contract_holds_for_scopes():
    def dense(scope, x):
        kernel = scope.param("kernel", nn.initializers.lecun_normal(), (2, 3))
        return x @ kernel + scope.param("bias", nn.initializers.zeros_init(), (3,))

    use = crossvjp.custom_vjp(dense, lambda scope, x: crossvjp.vjp(dense, scope, x), bwd)
    _, params = flax.core.init(use)(jax.random.key(0), the_input())
    loss = lambda fn: lambda params, x: flax.core.apply(scalar(fn))(params, x)
    own = jax.grad(loss(dense), argnums=(0, 1))(params, the_input())
    for outer in (lambda g: g, jax.jit):
        params_bar, x_bar = jax.grad(outer(loss(use)), argnums=(0, 1))(params, the_input())
        assert_close(params_bar, jax.tree.map(jnp.sign, own[0]))
        assert_close(x_bar, own[1])

    kept: list[Any] = []
    forward = lambda scope, x: (kept.append(scope), (dense(scope, x), x))[1]
    stale = crossvjp.custom_vjp(dense, forward, lambda x, y_bar: (dense(kept[-1], x)[:2], None))
    with pytest.raises(crossvjp.HandleError, match="A scope is not usable in the backward pass"):
        jax.grad(loss(stale))(params, the_input())


def test_state_is_chosen_beside_the_parameters():
    """Batch statistics get a cotangent of the rule where `grad_vars` lists them."""

    class Net(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, x):
            return self.use(nn.BatchNorm(use_running_average=True), x)

    x = jax.random.normal(jax.random.key(1), (4, 3))
    variables = Net(f).init(jax.random.key(0), x)
    both = ["params", "batch_stats"]
    use = crossvjp.custom_vjp(f, lambda mdl, x: crossvjp.vjp(f, mdl, x, grad_vars=both), bwd, grad_vars=both)

    def loss(use):
        def run(variables):
            y: Any = Net(use).apply(variables, x)
            return jnp.sum(y**3)

        return run

    own = jax.grad(loss(f))(variables)
    assert_same_bits(jax.grad(loss(use))(variables), jax.tree.map(jnp.sign, own))
    # With the default, the statistics keep their own gradient.
    bar = jax.grad(loss(sign_grad))(variables)
    assert_same_bits(bar["params"], jax.tree.map(jnp.sign, own["params"]))
    assert_close(bar["batch_stats"], own["batch_stats"])


def test_haiku_state_is_chosen_beside_the_parameters():
    transformed = hk.transform_with_state(lambda use, x: use(hk.BatchNorm(True, True, 0.9), x, False))
    call = lambda mdl, x, is_training: mdl(x, is_training)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    params, state = transformed.init(None, lambda mdl, x, _: mdl(x, True), x)
    state = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == jnp.float32 else leaf, state)
    both = ["params", "state"]
    use = crossvjp.custom_vjp(
        call, lambda mdl, *args: crossvjp.vjp(call, mdl, *args, grad_vars=both), _sign_all, grad_vars=both
    )

    def loss(use):
        return lambda params, floats: jnp.sum(
            transformed.apply(params, jax.tree.map(lambda a, b: a if b is None else b, state, floats), None, use, x)[0]
            ** 3
        )

    floats = jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.float32 else None, state)
    own = jax.grad(loss(call), argnums=(0, 1))(params, floats)
    assert_same_bits(jax.grad(loss(use), argnums=(0, 1))(params, floats), jax.tree.map(jnp.sign, own))


def _sign_all(pullback, y_bar):
    bar = pullback(y_bar)
    return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))
