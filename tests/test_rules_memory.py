"""Rules that spare memory: the gradient against autodiff and optax, and the bytes that they spare."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from five import five
from flax import nnx
from memory_use import kept_bytes, temporary_bytes

import crossvjp as cv
from crossvjp.rules import ChunkedCrossEntropy, ColumnRowSampling, Microbatch, OptimizerInBackward, Recompute
from crossvjp.testing import CheckError, check_rule

F32 = jnp.float32
LAYERS, BATCH, WIDTH = 6, 512, 64
ACTIVATION = BATCH * WIDTH * 4


def network(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def arrays(*shapes, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def shapes(*each):
    return [jax.ShapeDtypeStruct(shape, F32) for shape in each]


def a_network():
    return shapes(*[(WIDTH, WIDTH)] * LAYERS), *shapes((BATCH, WIDTH))


def pulled(fn, *primals, bar):
    y, pull = jax.vjp(fn, *primals)
    return y, pull(bar)


def error(found, expected):
    """The largest difference of an array to another, in units of that array's largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def test_recomputing_keeps_nothing_but_arguments_and_gives_the_same_gradient():
    *weights, x, y_bar = arrays((5, 5), (5, 5), (3, 5), (3, 5))
    found, expected = (pulled(fn, weights, x, bar=y_bar) for fn in (Recompute().lift(network), network))
    assert error(found, expected) < 1e-6  # the same operations, perhaps fused otherwise
    assert kept_bytes(network, *a_network()) > LAYERS * ACTIVATION
    assert kept_bytes(Recompute().lift(network), *a_network()) == 0


def barriers(jaxpr):
    """Finds the barriers in a program and in those inside of it: the shapes of what each of them holds back."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            yield [var.aval.shape for var in equation.invars]
        for inside in equation.params.values():
            yield from barriers(inside.jaxpr) if hasattr(inside, "jaxpr") else ()


def test_recomputing_waits_for_the_cotangent():
    w, x, y_bar = arrays((5, 4), (3, 5), (3, 4))
    backward = lambda w, x, y_bar: pulled(Recompute().lift(lambda w, x: jnp.tanh(x @ w)), w, x, bar=y_bar)[1]
    (held_back,) = barriers(jax.make_jaxpr(backward)(w, x, y_bar).jaxpr)
    assert sorted(held_back) == sorted(leaf.shape for leaf in (w, x, y_bar))


class Dropping(nnx.Module):
    """A layer with dropout."""

    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x, *, how, times):
        return self.dropout(jnp.tanh(self.linear(x))) * {"double": 2.0, "as it is": 1.0}[how] * times


def test_recomputing_draws_the_same_dropout_mask_and_takes_any_argument():
    (x,) = arrays((3, WIDTH))

    def twice(use):
        def loss(x, times):
            block = Dropping()
            return sum(jnp.sum(use(block)(x, how=how, times=times)) for how in ("double", "as it is"))

        return jax.value_and_grad(loss, (0, 1))(x, jnp.array(0.7))

    assert error(twice(Recompute()), twice(lambda mdl: mdl)) < 1e-6  # as above


def mean_loss(p, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ p["w"] + p["b"], labels).mean()


def tokens(count=12):
    x, w, b = arrays((count, 4), (4, 7), (7,))
    return {"w": w, "b": b}, x, jnp.arange(count) % 7


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


IN_PARTS = {"microbatch": Microbatch(4), "chunked": ChunkedCrossEntropy(4), "one part": ChunkedCrossEntropy(1)}
each_in_parts = pytest.mark.parametrize("rule", IN_PARTS.values(), ids=IN_PARTS)


@pytest.mark.usefixtures("x64")
@each_in_parts
@pytest.mark.parametrize("factor", [1.0, 2.0, -0.3])
def test_cross_entropy_in_parts_is_that_of_optax_at_every_cotangent(rule, factor):
    p, x, labels = tokens()
    bars = lambda fn: jax.value_and_grad(lambda p, x: factor * fn(p, x, labels), (0, 1))(p, x)
    assert error(bars(rule.lift(mean_loss)), bars(mean_loss)) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", [Recompute(), *IN_PARTS.values()], ids=repr)
def test_second_derivatives_are_those_of_the_function(rule):
    p, x, labels = tokens(4)
    hessian = lambda fn: jax.jit(jax.hessian(lambda b: fn(p | {"b": b}, x, labels)))(p["b"])
    assert error(hessian(rule.lift(mean_loss)), hessian(mean_loss)) < 1e-12


class ForgetsHidden(cv.Rule):
    """Multiplies only the variables' gradient by the cotangent that flows in, not that of the hidden states."""

    def forward(self, call):
        """Computes the gradient."""
        loss, pullback = call.vjp_at(call.variables, *call.inputs)
        return loss, cv.Residuals(bar=pullback(jnp.ones_like(loss)))

    def backward(self, call, y_bar):
        """Forgets it."""
        bar = call.residuals.bar
        return bar.replace(variables=jax.tree.map(lambda g: g * y_bar, bar.variables))


def test_a_cross_entropy_that_forgets_the_cotangent_of_the_hidden_states_is_caught():
    (plain, *_) = five(tokens()[0], mean_loss, tokens()[1:])
    with pytest.raises(CheckError, match="is the cotangent that flows in forgotten"):
        check_rule(ForgetsHidden(), [plain])


def a_head():
    vocabulary = 1024
    w, hidden = shapes((WIDTH, vocabulary), (BATCH, WIDTH))
    return {"w": w, "b": jax.ShapeDtypeStruct((vocabulary,), F32)}, hidden, jnp.zeros(BATCH, int)


def test_chunked_cross_entropy_never_has_the_logits_of_the_batch():
    p, hidden, labels = a_head()
    logits, gradient = BATCH * 1024 * 4, ACTIVATION + (WIDTH + 1) * 1024 * 4

    def needs(fn):
        at_labels = lambda p, hidden: fn(p, hidden, labels)
        return kept_bytes(at_labels, p, hidden), temporary_bytes(jax.grad(at_labels, (0, 1)), p, hidden)

    kept, temporary = needs(mean_loss)
    assert min(kept, temporary) >= logits
    kept, temporary = needs(ChunkedCrossEntropy(16).lift(mean_loss))
    assert kept == gradient
    assert temporary < gradient + logits / 4  # a few arrays like the logits of one of 16 parts


def test_chunked_cross_entropy_does_not_compute_the_logits_twice():
    p, hidden, labels = a_head()
    loss = lambda rule: jax.grad(lambda p, hidden: rule.lift(mean_loss)(p, hidden, labels), (0, 1))
    products = lambda rule: str(jax.make_jaxpr(loss(rule))(p, hidden)).count("dot_general")
    assert products(ChunkedCrossEntropy(16)) == 3  # forwards, and backwards to the variables and the hidden states
    assert products(Microbatch(16)) == 4


def test_compiled_evaluation_by_chunked_cross_entropy_computes_no_gradient():
    p, hidden, labels = a_head()

    def flops(fn):
        analysis = jax.jit(fn).lower(p, hidden, labels).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    assert flops(ChunkedCrossEntropy(1).lift(mean_loss)) < 1.1 * flops(mean_loss)


def each_example(p, x):
    return {"y": jnp.tanh(x @ p["w"]), "positive": x[:, 0] > 0}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_microbatches_join_to_the_output_of_the_batch(parts):
    p, x, _ = tokens()
    found, expected = (
        jax.value_and_grad(
            lambda p, x, fn=fn: (jnp.sum(fn(p, x)["y"] ** 2), fn(p, x)["positive"]), (0, 1), has_aux=True
        )
        for fn in (Microbatch(parts).lift(each_example), each_example)
    )
    (value, positive), bars = found(p, x)
    (expected_value, expected_positive), expected_bars = expected(p, x)
    assert jnp.array_equal(positive, expected_positive)
    assert error((value, bars[0]["w"], bars[1]), (expected_value, expected_bars[0]["w"], expected_bars[1])) < 1e-12


@pytest.mark.usefixtures("x64")
def test_microbatches_of_a_sum_share_what_comes_by_keyword():
    p, x, _ = tokens()
    total = lambda p, x, *, scale: jnp.sum(jnp.tanh(scale * x @ p["w"]))
    bars = lambda fn: jax.grad(lambda p, x, scale: fn(p, x, scale=scale), (0, 1, 2))(p["w"], x, jnp.array(0.7))
    with_w = lambda fn: lambda w, x, *, scale: fn({"w": w}, x, scale=scale)
    assert error(bars(Microbatch(4, "sum").lift(with_w(total))), bars(with_w(total))) < 1e-12


def test_microbatches_need_less_memory():
    needs = lambda fn: temporary_bytes(jax.grad(lambda *args: jnp.mean(fn(*args)), (0, 1)), *a_network())
    assert kept_bytes(Microbatch(8).lift(network), *a_network()) == 0
    plain, in_parts = needs(network), needs(Microbatch(8).lift(network))
    assert plain >= LAYERS * ACTIVATION
    gradient, output = LAYERS * WIDTH * WIDTH * 4, ACTIVATION
    assert in_parts < 2 * gradient + 2 * output + 2 * LAYERS * ACTIVATION / 8  # a part's activations are an eighth


def test_microbatches_add_up_bfloat16_gradients_in_float32():
    x = jnp.ones((1024, 1), jnp.bfloat16)
    bar = jax.grad(lambda w: jnp.sum(Microbatch(1024).lift(lambda w, x: x * w)(w, x)).astype(F32))(
        jnp.ones((), jnp.bfloat16)
    )
    assert bar.dtype == jnp.bfloat16
    assert float(bar) == 1024  # in bfloat16, 256 + 1 is 256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Microbatch(0), "`parts` of Microbatch must be >= 1, but is 0"),
        (lambda: ChunkedCrossEntropy(0), "`parts` of ChunkedCrossEntropy must be >= 1, but is 0"),
        (lambda: ColumnRowSampling(0), "`rows` of ColumnRowSampling must be >= 1, but is 0"),
        (lambda: Microbatch(2, "max"), "must be 'mean' or 'sum', but is 'max'"),
    ],
)
def test_wrong_fields_are_refused(make, message):
    with pytest.raises(cv.ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "inputs", "message"),
    [
        (Microbatch(5), [(12, 4)], "The batch of 12 can't be cut into the 5 equal parts of Microbatch"),
        (Microbatch(2), [(12, 4), (6,)], r"all have the batch on axis 0, but their shapes are \[\(12, 4\), \(6,\)\]"),
        (Microbatch(2), [(12, 4), ()], "Pass by keyword what belongs to every example"),
        (ChunkedCrossEntropy(5), [(12, 4)], "The batch of 12 can't be cut into the 5 equal parts of ChunkedCross"),
        (ChunkedCrossEntropy(2), [(12, 4)], "is for functions that return one scalar"),
        (ColumnRowSampling(13), [(12, 4)], "can't draw so many rows of a batch of 12"),
        (ColumnRowSampling(2), [(12, 4), ()], "Pass by keyword what belongs to every example"),
    ],
)
def test_a_batch_that_can_not_be_cut_is_refused(rule, inputs, message):
    with pytest.raises(cv.ArgumentError, match=message):
        rule.lift(lambda w, x, *rest: x @ w, key=jax.random.key(0))(jnp.ones((4, 2)), *map(jnp.ones, inputs))


def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def sampled(rows, p, x, y_bar):
    def bars(key):
        return pulled(ColumnRowSampling(rows).lift(dense, key=key), p, x, bar=y_bar)

    return bars


@pytest.mark.usefixtures("x64")
def test_sampled_rows_give_the_gradient_on_average():
    p, x, _ = tokens(8)
    (y_bar,) = arrays((8, 7), seed=1)
    y, (expected, expected_x_bar) = pulled(dense, p, x, bar=y_bar)
    draws = 4000
    ys, (bars, x_bars) = jax.vmap(sampled(3, p, x, y_bar))(jax.random.split(jax.random.key(0), draws))
    assert error((ys[0], x_bars[0]), (y, expected_x_bar)) < 1e-12  # these are exact
    for name, bar in bars.items():
        deviation = jnp.std(bar, 0) / draws**0.5
        assert jnp.all(deviation > 0)
        assert jnp.all(jnp.abs(jnp.mean(bar, 0) - expected[name]) < 5 * deviation)  # of 35 numbers: one in 50000 tests


@pytest.mark.usefixtures("x64")
def test_all_rows_give_the_gradient_itself():
    p, x, _ = tokens(8)
    (y_bar,) = arrays((8, 7), seed=1)
    found = sampled(8, p, x, y_bar)(jax.random.key(0))
    assert error(found, pulled(dense, p, x, bar=y_bar)) < 1e-12


def test_a_linear_layer_keeps_only_the_sampled_rows():
    w, x = shapes((WIDTH, WIDTH), (BATCH, WIDTH))
    linear = lambda w, x: (x + 1) @ w  # so that the layer's input is no argument
    on = lambda use: lambda w, x: use(lambda w, x: x @ w)(w, x + 1)
    assert kept_bytes(linear, w, x) == ACTIVATION
    rule = ColumnRowSampling(BATCH // 8)
    kept = kept_bytes(on(lambda fn: rule.lift(fn, key=jax.random.key(0))), w, x)
    assert ACTIVATION / 8 <= kept < ACTIVATION / 8 + 1000  # and their numbers


def test_sampling_without_a_key_is_an_error():
    with pytest.raises(cv.ArgumentError, match="the call has no key"):
        ColumnRowSampling(2).lift(lambda w, x: x @ w)(jnp.ones((4, 2)), jnp.ones((3, 4)))


STACK = {"w": (12, 8, 8), "b": (12, 8)}


def a_stack():
    w, b, x = arrays(STACK["w"], STACK["b"], (5, 8), dtype=F32)
    return {"w": w / 8**0.5, "b": b}, x


def scanned_loss(p, x):
    return jnp.sum(jax.lax.scan(lambda x, p: (dense(p, x), None), x, p)[0] ** 2)


def sgd(p, x):
    return jax.tree.map(lambda leaf, g: leaf - 0.1 * g, p, jax.grad(scanned_loss)(p, x))


def in_backward(p, x):
    refs = jax.tree.map(jax.new_ref, p)

    def step(x, layer):
        values = jax.tree.map(lambda ref: ref[layer], refs)
        return OptimizerInBackward(refs, 0.1, layer).lift(dense)(values, x), None

    jax.grad(lambda x: jnp.sum(jax.lax.scan(step, x, jnp.arange(p["b"].shape[0]))[0] ** 2))(x)
    return jax.tree.map(lambda ref: ref[...], refs)


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["eagerly", "under jit"])
def test_the_optimizer_in_the_backward_pass_is_sgd(transform):
    p, x = a_stack()
    expected = sgd(p, x)
    assert error(expected, p) > 0.01
    assert error(transform(in_backward)(p, x), expected) < 1e-6  # the same numbers, fused otherwise


def test_the_optimizer_in_the_backward_pass_has_no_array_of_all_gradients():
    p = {"w": jax.ShapeDtypeStruct((24, 64, 64), F32), "b": jax.ShapeDtypeStruct((24, 64), F32)}
    size = 24 * 65 * 64 * 4
    x = jax.ShapeDtypeStruct((8, 64), F32)
    assert temporary_bytes(sgd, p, x, donate_argnums=0) > size
    # the layers' inputs, and one layer's gradient
    assert temporary_bytes(in_backward, p, x, donate_argnums=0) < size / 2


def test_the_optimizer_sends_new_parameters_through_a_channel():
    p, x = a_stack()
    p = jax.tree.map(lambda leaf: leaf[0], p)
    loss = lambda channel: jnp.sum(OptimizerInBackward(channel, 0.1).lift(dense)(p, x) ** 2)
    old = cv.Overwrite(p)
    new = old.settle(jax.grad(loss)(old))
    expected = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, p, jax.grad(lambda p: jnp.sum(dense(p, x) ** 2))(p))
    assert error(new.value, expected) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [lambda p: {"w": jax.new_ref(p["w"])}, lambda p: p, lambda p: cv.Overwrite({"w": p["w"]})],
    ids=["one is missing", "no mutable arrays", "a channel without one"],
)
def test_the_optimizer_refuses_parameters_that_do_not_fit(wrong):
    p, x = a_stack()
    p = jax.tree.map(lambda leaf: leaf[0], p)
    rule = OptimizerInBackward(wrong(p), 0.1)
    with pytest.raises(cv.ArgumentError, match="`parameters` of OptimizerInBackward must hold"):
        jax.grad(lambda x: jnp.sum(rule.lift(dense)(p, x)))(x)
