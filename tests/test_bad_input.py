"""Mistakes: each is an error that says what was expected, what came, where, and how to mend it."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hosts import HOSTS, Host, the_input
from rules import f, fwd, identity

import crossvjp
from crossvjp import ArgumentError, CotangentError, CrossVJPError, HandleError
from crossvjp.adapters.haiku import bind


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    """Each kind of handle in turn."""
    return HOSTS[request.param]


def differentiate(host, use, *args):
    """Takes the gradient with respect to parameters and input."""
    loss = lambda params, x: host.run(params, lambda mdl, x: jnp.sum(use(mdl, x, *args)), x)
    return jax.grad(loss, argnums=(0, 1))(host.params, the_input())


def returning(make):
    """Makes a use whose backward function returns `make(own cotangents)`."""

    def backward(pullback, y_bar):
        return make(pullback(y_bar))

    return crossvjp.custom_vjp(f, fwd, backward)


@pytest.mark.parametrize(
    "handle", [object(), "dense", 3, jnp.tanh, {}, [object()]], ids=lambda handle: type(handle).__name__
)
def test_an_unknown_handle_names_what_came_and_what_is_expected(handle):
    with pytest.raises(HandleError, match=r"must be a module of Flax Linen.*but is .*register_adapter"):
        identity.lift(lambda mdl, x: x)(handle, the_input())


def test_a_handle_of_two_frameworks_names_both():
    mixed = (eqx.nn.Linear(2, 3, key=jax.random.key(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(HandleError, match=r"holds modules of Equinox and Flax NNX. Pass all but one as inputs"):
        identity.lift(lambda mdl, x: x)(mixed, the_input())


@pytest.mark.parametrize("handle", [nn.Dense(3), (nn.Dense(3), nn.Dense(3))], ids=["module", "tuple"])
def test_an_unbound_linen_module_says_how_to_bind_it(handle):
    with pytest.raises(HandleError, match=r"Linen module Dense is unbound.*module\.bind\(variables\)"):
        identity.lift(lambda mdl, x: x)(handle, the_input())


def test_a_linen_handle_with_an_array_says_where_arrays_go():
    bound = nn.Dense(3).bind(nn.Dense(3).init(jax.random.key(0), the_input()))
    with pytest.raises(ArgumentError, match=r"modules and scopes only.*Pass arrays as inputs"):
        identity.lift(lambda mdl, x: x)((bound, the_input()), the_input())


def test_a_haiku_module_outside_of_a_transform_says_where_it_can_be_used():
    kept = []
    hk.transform(lambda x: kept.append(hk.Linear(3)) or kept[0](x)).init(jax.random.PRNGKey(0), the_input())
    with pytest.raises(HandleError, match=r"Haiku module linear is used outside of a transform.*adapters\.haiku\.bind"):
        identity(kept[0])(the_input())


def test_a_transformed_function_without_parameters_says_how_to_bind_it():
    transformed = hk.transform(lambda x: hk.Linear(3)(x))
    with pytest.raises(HandleError, match=r"Transformed has no parameters of its own. Bind it.*bind\(transformed"):
        identity.lift(lambda mdl, x: x)(transformed, the_input())


def test_binding_without_the_state_says_so():
    transformed = hk.transform_with_state(lambda x: hk.Linear(3)(x))
    with pytest.raises(HandleError, match="TransformedWithState takes `params` and `state`, but got no state"):
        bind(transformed, {})


def test_a_module_that_cant_be_called_points_to_lift():
    with pytest.raises(ArgumentError, match=r"dict can't. Use rule\.lift\(fn\)\(mdl, \*args\)"):
        identity({"w": the_input()})


def test_a_cotangent_of_wrong_shape_names_argument_path_and_both_types(host):
    use = returning(lambda bar: bar.replace(variables=jax.tree.map(lambda leaf: leaf[..., :1], bar.variables)))
    with pytest.raises(
        CotangentError, match=r"'backward'.*of `variables` must be float32\[.*\] at \[.*\], but is float"
    ):
        differentiate(host, use)


def test_a_cotangent_of_wrong_structure_names_the_leaf_that_is_not_there(host):
    use = returning(lambda bar: bar.replace(variables={"nowhere": jnp.zeros(2)}))
    with pytest.raises(CotangentError, match=r"`variables` has a leaf at \['nowhere'\] where `variables` has none"):
        differentiate(host, use)


def test_a_cotangent_that_lacks_a_leaf_names_it(host):
    use = returning(lambda bar: bar.replace(variables={}))
    with pytest.raises(CotangentError, match=r"of `variables` has no leaf at \[.*None stands for a zero cotangent"):
        differentiate(host, use)


def test_a_cotangent_of_the_input_is_checked_as_well(host):
    use = returning(lambda bar: bar.replace(inputs=(jnp.zeros(5),)))
    with pytest.raises(CotangentError, match=r"of input 0 must be float32\[2\] at its root, but is float32\[5\]"):
        differentiate(host, use)


def test_a_cotangent_that_is_no_array_names_its_type(host):
    use = returning(lambda bar: bar.replace(inputs=("nothing",)))
    with pytest.raises(CotangentError, match=r"of input 0 must be float32\[2\] at its root, but is of type str"):
        differentiate(host, use)


def test_a_complex_cotangent_of_a_real_input_is_not_truncated(host):
    use = returning(lambda bar: bar.replace(inputs=(bar.inputs[0] * (1 + 1j),)))
    with pytest.raises(CotangentError, match=r"must be float32\[2\].*but is complex64\[2\]; take its real part"):
        differentiate(host, use)


def test_the_other_order_is_recognised_and_both_remedies_are_named(host):
    use = returning(lambda bar: (bar.variables, bar.inputs[0]))
    with pytest.raises(
        CotangentError, match=r"order \(variables_bar, input0_bar\); expected \(input0_bar, variables_bar\)"
    ):
        differentiate(host, use)
    with pytest.raises(CotangentError, match="Turn them round, return a Cotangents, or pass order='variables_first'"):
        differentiate(host, use)


def test_the_documented_order_is_recognised_where_todays_flax_order_was_announced(host):
    def backward(pullback, y_bar):
        x_bar, variables_bar = pullback(y_bar)
        return x_bar, variables_bar

    use = crossvjp.custom_vjp(f, fwd, backward, order="variables_first")
    with pytest.raises(CotangentError, match="pass order='inputs_first'"):
        differentiate(host, use)


def test_too_few_cotangents_say_how_many_are_expected(host):
    use = returning(lambda bar: (bar.variables,))
    with pytest.raises(
        CotangentError, match=r"one cotangent for each of the 1 differentiable inputs.*returned 0 and one"
    ):
        differentiate(host, use)


def test_no_cotangents_at_all_say_what_to_return(host):
    with pytest.raises(CotangentError, match=r"must return a Cotangents or the tuple \(input0_bar, variables_bar\)"):
        differentiate(host, returning(lambda bar: None))


def test_the_argument_of_a_pullback_is_checked(host):
    def backward(pullback, y_bar):
        return pullback(y_bar[:1])

    with pytest.raises(CotangentError, match=r"pullback's cotangent of the output must be float32\[3\].*float32\[1\]"):
        differentiate(host, crossvjp.custom_vjp(f, fwd, backward))


@pytest.mark.parametrize("result", [lambda y: y, lambda y: (y, y, y), lambda y: None], ids=["array", "triple", "none"])
def test_a_forward_function_that_returns_no_pair_is_told_so(host, result):
    use = crossvjp.custom_vjp(f, lambda mdl, x: result(f(mdl, x)), lambda residuals, y_bar: (None, None))
    with pytest.raises(ArgumentError, match=r"`forward_fn` must return a pair \(y, residuals\).*but returned"):
        differentiate(host, use)


def test_a_forward_function_with_another_output_is_told_both(host):
    use = crossvjp.custom_vjp(f, lambda mdl, x: (f(mdl, x)[:1], None), lambda residuals, y_bar: (None, None))
    loss = jax.jit(lambda params: host.run(params, use, the_input()).sum())
    with pytest.raises(ArgumentError, match=r"the output of f\. f returned float32\[3\], but <lambda> float32\[1\]"):
        jax.grad(loss)(host.params)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "has 0, which is the module itself"),
        (5, r"has 5, but this call of f\(mdl, \*args\) has arguments at positions 1 to 1"),
        (-1, "has -1, but this call"),
        ("x", "must be integers, but has 'x'"),
    ],
    ids=str,
)
def test_a_nondiff_argnum_at_the_module_or_past_the_end_is_named(host, number, message):
    use = crossvjp.custom_vjp(f, fwd, lambda *args: None, nondiff_argnums=[number])
    with pytest.raises(ArgumentError, match=message):
        host.run(host.params, use, the_input())


@pytest.mark.parametrize(
    "grad_vars", ["*/nowhere", ["*/nowhere"], lambda path, leaf: False], ids=["glob", "list", "fn"]
)
def test_a_filter_that_matches_nothing_lists_the_paths(host, grad_vars):
    use = crossvjp.custom_vjp(f, fwd, lambda pullback, y_bar: pullback(y_bar), grad_vars=grad_vars)
    with pytest.raises(ArgumentError, match=r"selects no differentiable array of the module. Its paths are '.*"):
        host.run(host.params, use, the_input())


@pytest.mark.parametrize("grad_vars", [3.5, object()], ids=["number", "object"])
def test_a_word_that_no_framework_has_lists_the_words_that_there_are(host, grad_vars):
    use = crossvjp.custom_vjp(f, fwd, lambda pullback, y_bar: pullback(y_bar), grad_vars=grad_vars)
    with pytest.raises(ArgumentError, match=r"`grad_vars` must be .*a path glob such as"):
        host.run(host.params, use, the_input())


def test_an_unknown_order_lists_the_orders():
    with pytest.raises(ArgumentError, match="`order` must be 'inputs_first' or 'variables_first', but is 'flax'"):
        crossvjp.custom_vjp(f, fwd, fwd, order="flax")  # pyright: ignore[reportArgumentType]  the mistake under test


@pytest.mark.parametrize("name", ["fn", "forward_fn", "backward_fn"])
def test_what_is_no_function_is_named(name):
    functions = {"fn": f, "forward_fn": fwd, "backward_fn": fwd, name: 3}
    with pytest.raises(ArgumentError, match=f"`{name}` must be a function, but is 3"):
        crossvjp.custom_vjp(**functions)


def test_every_error_is_one_of_the_library_and_of_python():
    assert issubclass(ArgumentError, CrossVJPError)
    assert issubclass(ArgumentError, TypeError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(HandleError, CrossVJPError)
    assert issubclass(HandleError, TypeError)
    assert issubclass(CotangentError, CrossVJPError)
    assert issubclass(CotangentError, ValueError)


def test_a_failed_call_leaves_the_live_module_as_it_was():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.rngs = rngs.fork()

        def __call__(self, x):
            return self.norm(x) + jax.random.normal(self.rngs.dropout())

    net = Net(nnx.Rngs(0, dropout=1))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))
    count = int(net.rngs.dropout.count.get_value())
    use = crossvjp.custom_vjp(f, lambda mdl, x: mdl(x), lambda *args: None)
    with pytest.raises(ArgumentError, match="must return a pair"):
        nnx.grad(lambda net: use(net, jnp.ones((4, 3))).sum())(net)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(net.rngs.dropout.count.get_value()) == count
