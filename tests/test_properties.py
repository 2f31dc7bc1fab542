"""The core over generated trees: what holds of a tree made by hand holds of any."""

from __future__ import annotations

import enum
import functools
import math
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis.configuration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.custom_derivatives import SymbolicZero
from rules import identity, unchanged

import crossvjp
from crossvjp import CotangentError, Cotangents
from crossvjp._arrays import Static, take_apart
from crossvjp._partition import Partition

# What hypothesis keeps between runs stays out of the repository. Its plugin writes while tests are
# collected, so a fixture would come too late.
hypothesis.configuration.set_hypothesis_home_dir(pathlib.Path(tempfile.gettempdir(), "crossvjp-hypothesis"))


def examples(count: int) -> settings:
    """Runs a property on so many examples, the same ones each time, so that a failure in CI can be run again."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,  # an example may be the first with its shapes, and compile
        suppress_health_check=[HealthCheck.too_slow],  # for the same reason
        phases=[Phase.generate],  # shrinking a failure takes minutes, and trees are small as they are
        report_multiple_bugs=False,
    )


class Color(enum.Enum):
    """An object that pickles."""

    RED = 1


class Elementwise:
    """An object whose `==` gives no truth value."""

    def __eq__(self, other: object) -> Any:
        return np.array([True, False])

    __hash__ = object.__hash__


DTYPES = (jnp.float32, jnp.bfloat16, jnp.complex64, jnp.int32, jnp.bool_, jnp.uint8)
SHAPES = ((), (2,), (0, 3))
PICKLED = (3, -0.5, True, 2 + 1j, "relu", Color.RED, len)
STATICS = (*PICKLED, np.float32, jnp.tanh, lambda x: x, object(), Elementwise())

# On these numbers the arithmetic of `mix` is exact in every dtype, in bfloat16 with its 8 bits too, since
# trees are small. So the bits depend neither on what the compiler fuses nor on the order of a sum.
exact = st.integers(-2, 2)
inexact = st.floats(-4, 4, width=32)
special = st.floats(width=32)


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_key(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def has_gradient(leaf: Any) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


@st.composite
def arrays(draw: Any, numbers: Any = exact) -> Any:
    """Makes a JAX array, a NumPy array or a NumPy scalar."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    size = math.prod(shape)
    drawn: Any = np.array(draw(st.lists(numbers, min_size=2 * size, max_size=2 * size)))
    with np.errstate(all="ignore"):  # of NaN and infinity an integer is whatever it is
        values = drawn[:size] + 1j * drawn[size:] if dtype == jnp.complex64 else drawn[:size]
        made = np.reshape((np.abs(values) if dtype == jnp.uint8 else values).astype(dtype), shape)
    return draw(st.sampled_from((jnp.asarray, np.asarray, lambda array: array[()])))(made)


@functools.cache
def key(seed: int, impl: str, *, split: bool) -> Any:
    made = jax.random.key(seed, impl=impl)
    return jax.random.split(made) if split else made


keys = st.builds(key, st.integers(0, 2), st.sampled_from(("threefry2x32", "rbg")), split=st.booleans())


def leaves(numbers: Any = exact, statics: Any = STATICS) -> Any:
    """Makes leaves of all kinds, half of them arrays."""
    return st.one_of(arrays(numbers), arrays(numbers), keys, st.sampled_from(statics))


def trees(leaf: Any, max_leaves: int = 6) -> Any:
    """Makes nested lists, tuples and dicts, empty ones and `None` among them.

    A "value" in a path may be taken for the key of a framework's box, and "params" for a collection.
    """
    names = st.sampled_from(("a", "b", "params", "value"))
    grow = lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(names, inner, max_size=3)
    )
    return st.recursive(st.one_of(leaf, leaf, st.none()), grow, max_leaves=max_leaves)


def has_an_array(tree: Any) -> bool:
    return any(map(is_array, jax.tree.leaves(tree)))


def any_tree(numbers: Any = exact, statics: Any = STATICS, max_leaves: int = 6) -> Any:
    return trees(leaves(numbers, statics), max_leaves)


def handles(numbers: Any = exact, statics: Any = STATICS) -> Any:
    """Makes trees with an array; one without is no handle."""
    return any_tree(numbers, statics).filter(has_an_array)


def calls(numbers: Any = exact, statics: Any = STATICS) -> Any:
    """Makes the arguments of a call: a handle, two inputs, and one by keyword."""
    tree = any_tree(numbers, statics, max_leaves=3)
    return st.tuples(handles(numbers, statics), st.tuples(tree, tree), st.fixed_dictionaries({"extra": tree}))


def number(leaf: Any) -> Any:
    """Makes a number of any leaf."""
    if not is_array(leaf):
        return jnp.float32(leaf.real if isinstance(leaf, int | float | complex) else 1)
    array = jax.random.key_data(leaf)[..., -1] % 3 if is_key(leaf) else jnp.asarray(leaf)
    if array.dtype == jnp.complex64:
        array = array.real - 2 * array.imag
    return array.astype(jnp.float32).sum()


def mix(mdl: Any, *inputs: Any, **keywords: Any) -> Any:
    """Squares each differentiable leaf, and adds to it a sum in which every leaf counts."""
    tree = (mdl, inputs, keywords)
    total: Any = sum(map(number, jax.tree.leaves(tree)), start=jnp.float32(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) * leaf + total.astype(leaf.dtype) if has_gradient(leaf) else leaf, tree
    )


def separate(tree: Any, wanted: Callable[[Any], bool]) -> tuple[list[Any], Callable[..., Any]]:
    """Lists the wanted leaves of a tree, and gives a function that puts others in their place."""
    flat, treedef = jax.tree.flatten(tree)
    mask = list(map(wanted, flat))

    def fill(chosen: Any, into: Any = tree) -> Any:
        rest = iter(chosen)
        filled = [next(rest) if able else leaf for able, leaf in zip(mask, jax.tree.leaves(into), strict=True)]
        return jax.tree.unflatten(treedef, filled)

    return [leaf for able, leaf in zip(mask, flat, strict=True) if able], fill


def value_and_grads(
    fn: Any, call: Any, transform: Any = lambda function: function, wanted: Callable[[Any], bool] = has_gradient
) -> Any:
    """Gives a loss of the outputs of `fn`, and its gradient for each wanted leaf of the call.

    The loss weighs outputs by their positions, so that not all cotangents are the same.
    """
    able, fill = separate(call, wanted)
    others, fill_others = separate(call, lambda leaf: is_array(leaf) and not wanted(leaf))

    def loss(able: Any, others: Any) -> Any:
        mdl, inputs, keywords = fill(able, fill_others(others))
        out = jax.tree.leaves(fn(mdl, *inputs, **keywords))
        return sum((number(leaf) * (1 + index % 3) for index, leaf in enumerate(out)), start=jnp.float32(0))

    return transform(jax.value_and_grad(loss))(able, others)


def bits(leaf: Any) -> Any:
    """Gives all there is to an array, so that NaN is itself and -0.0 is not 0.0."""
    return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes()


def assert_same(one: Any, other: Any) -> None:
    """Compares two trees: containers, bits of arrays, and identity of all else."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if is_array(b):
            assert bits(a) == bits(b)
        else:
            assert a is b


def by_custom_vjp(fn: Any) -> Any:
    return crossvjp.custom_vjp(fn, lambda mdl, *args, **kwargs: crossvjp.vjp(fn, mdl, *args, **kwargs), unchanged)


WRAPS = {"rule": identity.lift, "custom_vjp": by_custom_vjp}
both_wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


@both_wraps
@examples(25)
@given(call=calls(inexact))
def test_a_call_under_the_identity_has_its_own_value_and_gradients(wrap, call):
    assert_same(value_and_grads(wrap(mix), call), value_and_grads(mix, call))


@both_wraps
@examples(10)
@given(call=calls())
def test_a_compiled_call_under_the_identity_has_its_own_value_and_gradients(wrap, call):
    assert_same(value_and_grads(wrap(mix), call, jax.jit), value_and_grads(mix, call))


@both_wraps
@examples(12)
@given(call=calls(inexact, statics=(-0.5, 1.5, 2 + 1j)))
def test_python_numbers_that_are_differentiated_have_their_gradient(wrap, call):
    """They pass through as they are only where JAX does not trace them."""
    wanted = lambda leaf: has_gradient(leaf) or isinstance(leaf, float | complex)
    assert_same(value_and_grads(wrap(mix), call, wanted=wanted), value_and_grads(mix, call, wanted=wanted))


def doubled(pullback: Any, y_bar: Any) -> Any:
    bar = pullback(y_bar)
    return bar.replace(variables=jax.tree.map(lambda leaf: 2 * leaf, bar.variables))


@crossvjp.rule
def double(call, y_bar):
    """Doubles the gradient of the variables."""
    return doubled(call.pullback, y_bar)


@crossvjp.rule
def swap(call, y_bar):
    """Takes the inputs for each other."""
    bar = call.pullback(y_bar)
    return bar.replace(inputs=bar.inputs[::-1])


@crossvjp.rule
def forget(call, y_bar):
    """Gives the keyword input no gradient."""
    return call.pullback(y_bar).replace(keywords={"extra": None})


@pytest.mark.parametrize("wrong", [double, swap, forget], ids=repr)
def test_the_comparison_catches_a_wrong_rule(wrong):
    one, two, three = (jnp.full(2, number, jnp.bfloat16) for number in (1, 2, -1))
    call = ({"a": one, "n": 3}, (one, two), {"extra": three})
    with pytest.raises(AssertionError, match=r"assert.*bfloat16"):
        assert_same(value_and_grads(wrong.lift(mix), call), value_and_grads(mix, call))


def as_it_is(run: Any, args: Any) -> Any:
    return run(*args)


def differentiated(run: Any, args: Any) -> Any:
    """Runs under `grad`, with the gradient flowing into every output that has one."""
    able, fill = separate(args, has_gradient)
    fills = []

    def loss(able: Any) -> Any:
        found, fill_out = separate(run(*fill(able)), is_array)
        fills.append(fill_out)
        return sum(map(number, found), start=jnp.float32(0)), found

    (_, found), _ = jax.value_and_grad(loss, has_aux=True)(able)
    return fills[-1](found)


def compiled(run: Any, args: Any) -> Any:
    """Runs under `jit`: the arrays go through it, and what is no array stays as it was when traced."""
    given_arrays, fill = separate(args, is_array)
    fills = []

    def inner(arrays: Any) -> Any:
        found, fill_out = separate(run(*fill(arrays)), is_array)
        fills.append(fill_out)
        return found

    found = jax.jit(inner)(given_arrays)
    return fills[-1](found)


@pytest.mark.parametrize("way", [as_it_is, differentiated, compiled])
@both_wraps
@examples(20)
@given(handle=handles(special), arg=any_tree(special), held=any_tree(special))
def test_outputs_of_any_tree_pass_through_unchanged(wrap, way, handle, arg, held):
    """They are the handle, an input, and a tree that the function holds."""
    run = wrap(lambda mdl, x: [mdl, x, held])
    assert_same(way(run, (handle, arg)), [handle, arg, held])


@examples(40)
@given(handle=handles(special), arg=any_tree(special), frozen=any_tree(special), held=any_tree(special))
def test_residuals_of_any_tree_arrive_as_they_were(handle, arg, frozen, held):
    arrived = []

    def forward(mdl: Any, w: Any, x: Any, frozen: Any) -> Any:
        return w, {"mdl": mdl, "x": x, "held": held}

    def backward(*args: Any) -> Any:
        arrived.append(args)
        return None, None, None

    fn = crossvjp.custom_vjp(lambda mdl, w, x, frozen: w, forward, backward, nondiff_argnums=3)
    assert float(jax.grad(lambda w: 3 * fn(handle, w, arg, frozen))(jnp.float32(1))) == 0.0
    assert_same(arrived, [(frozen, {"mdl": handle, "x": arg, "held": held}, jnp.float32(3))])


@examples(12)
@given(handle=handles(), held=any_tree())
def test_residuals_cross_a_program_that_is_compiled_before_it_is_differentiated(handle, held):
    """There they are outputs of one compiled program and inputs of another, so their numbers are seen in a gradient."""
    statics = []
    static_half = lambda tree: jax.tree.map(lambda leaf: None if is_array(leaf) else leaf, tree)

    def backward(residuals: Any, y_bar: Any) -> Any:
        statics.append(static_half(residuals))
        flat = jax.tree.leaves(residuals)
        return y_bar * sum((number(leaf) * (1 + index) for index, leaf in enumerate(flat)), jnp.float32(0)), None

    fn = crossvjp.custom_vjp(lambda mdl, w: w, lambda mdl, w: (w, [mdl, held]), backward)
    given_arrays, fill = separate(handle, is_array)
    w_bar = jax.grad(jax.jit(lambda w, arrays: fn(fill(arrays), w)))(1.0, given_arrays)
    flat = jax.tree.leaves([handle, held])
    assert float(w_bar) == sum(float(number(leaf)) * (1 + index) for index, leaf in enumerate(flat))
    assert_same(statics[-1], static_half([handle, held]))


CASTS = {
    False: (np.float16, np.float32, np.float64, jnp.bfloat16, np.int32),
    True: (np.complex64, np.complex128, np.float32, np.int32),
}


def random(leaf: Any, seed: int, dtype: Any = None) -> Any:
    """Makes small whole numbers shaped like a leaf."""
    drawn = np.random.default_rng(seed).integers(-2, 3, (2, *leaf.shape))
    values = drawn[0] + 1j * drawn[1] if jnp.issubdtype(dtype or leaf.dtype, jnp.complexfloating) else drawn[0]
    return values.astype(dtype or leaf.dtype)


def by_name(tree: Any) -> dict[str, Any] | None:
    """Gives the children of a container by the names that they have in paths, or `None` for a leaf."""
    if isinstance(tree, list | tuple):
        return {str(index): child for index, child in enumerate(tree)}
    return tree if isinstance(tree, dict) else None


@st.composite
def cotangents(draw: Any, tree: Any) -> tuple[Any, list[Any]]:
    """Writes a cotangent of a tree in one of the forms that are forgiven, with the gradients that it stands for."""
    children = by_name(tree)
    if draw(st.integers(0, 5)) == 0:
        return None, [np.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree) if has_gradient(leaf)]
    if children is not None:
        drawn = {name: draw(cotangents(child)) for name, child in sorted(children.items())}
        bars = {name: bar for name, (bar, _) in drawn.items()}
        kind = draw(st.sampled_from((dict, list, tuple) if isinstance(tree, list | tuple) else (dict,)))
        return bars if kind is dict else kind(bars.values()), [leaf for _, flat in drawn.values() for leaf in flat]
    if not is_array(tree):
        return None, []
    if not has_gradient(tree):
        return draw(st.sampled_from((None, np.zeros((), jax.dtypes.float0), np.ones(4)))), []
    if draw(st.integers(0, 4)) == 0:
        return SymbolicZero.from_primal_value(jnp.asarray(tree)), [np.zeros(tree.shape, tree.dtype)]
    is_complex = bool(jnp.issubdtype(tree.dtype, jnp.complexfloating))
    bar = random(tree, draw(st.integers(0, 99)), draw(st.sampled_from(CASTS[is_complex])))
    made = draw(st.sampled_from((jnp.asarray, np.asarray, *([lambda array: array.item()] if tree.shape == () else []))))
    return made(bar), [bar.astype(tree.dtype)]


def gradients_under(bars: Any, handle: Any, arg: Any) -> Any:
    """Gives the gradients of a call whose rule returns the given cotangents of the input and the variables."""
    able, fill = separate((handle, arg), has_gradient)
    lifted = crossvjp.rule(lambda call, y_bar: bars).lift(lambda mdl, x: jnp.float32(0), grad_vars=True)
    return jax.grad(lambda able: lifted(*fill(able)))(able)


@examples(100)
@given(data=st.data(), handle=handles(), arg=any_tree(), named=st.booleans())
def test_cotangents_are_forgiven_their_form(data, handle, arg, named):
    variables_bar, variables_expected = data.draw(cotangents(handle))
    input_bar, input_expected = data.draw(cotangents(arg))
    bars = Cotangents((input_bar,), variables_bar) if named else (input_bar, variables_bar)
    assert_same(gradients_under(bars, handle, arg), [*variables_expected, *input_expected])


@examples(20)
@given(names=st.sets(st.sampled_from(("a", "b", "value")), min_size=1), form=st.sampled_from((None, {"c": None})))
def test_none_stands_for_all_of_a_subtree_whatever_its_names(names, form):
    """Such as `{"attention": None}` for the kernels "query", "key" and "value"."""
    subtree = {name: jnp.ones(2) for name in sorted(names)}
    handle = {"kept": jnp.ones(2), "zero": subtree if form is None else {"c": subtree}}
    bar = {"kept": jnp.full(2, 5.0), "zero": form}
    expected = [jnp.full(2, 5.0), *(jnp.zeros(2) for _ in names)]
    assert_same(gradients_under(Cotangents((None,), bar), handle, None), expected)


def spelt_out(tree: Any) -> Any:
    """Writes a full cotangent of a tree, every container as a dict."""
    children = by_name(tree)
    if children is not None:
        return {name: spelt_out(child) for name, child in children.items()}
    return random(tree, 0) if has_gradient(tree) else None


def nodes(tree: Any, path: tuple[str, ...] = ()) -> Any:
    """Lists everything in a tree, containers too, with its path."""
    yield path, tree
    for name, child in (by_name(tree) or {}).items():
        yield from nodes(child, (*path, name))


def changed(bar: Any, path: tuple[str, ...], change: Callable[[Any], Any]) -> Any:
    """Changes what stands at a path of nested dicts; `...` deletes it."""
    if not path:
        made = change(bar)
        return {} if made is ... else made
    made = change(bar[path[0]]) if len(path) == 1 else changed(bar[path[0]], path[1:], change)
    others = {name: child for name, child in bar.items() if name != path[0]}
    return others if made is ... else others | {path[0]: made}


MISTAKES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str, tuple[str, ...]]] = {
    # where it can be made; what it makes of the cotangent there; what the error says; what it adds to the path
    "extra leaf": (
        lambda node: by_name(node) is not None,
        lambda bar: bar | {"extra": jnp.ones(2)},
        "has a leaf at {path} where {name} has none",
        ("extra",),
    ),
    "missing leaf": (has_gradient, lambda bar: ..., "has no leaf at {path}", ()),
    "wrong shape": (has_gradient, lambda bar: np.ones((5, *bar.shape)), "must be {type} at {path}, but is", ()),
    "complex for real": (
        lambda node: has_gradient(node) and node.dtype != jnp.complex64,
        lambda bar: bar.astype(np.complex64),
        "must be {type} at {path}, but is complex64",
        (),
    ),
    "no array": (has_gradient, lambda bar: "zero", "must be {type} at {path}, but is of type str", ()),
}


@pytest.mark.parametrize("position", ["input", "variables"])
@pytest.mark.parametrize("mistake", MISTAKES)
@examples(12)
@given(data=st.data())
def test_a_mistake_in_a_cotangent_names_its_path(mistake, position, data):
    can_be_made, change, message, more = MISTAKES[mistake]
    places = lambda tree: [(path, node) for path, node in nodes(tree) if can_be_made(node)]
    tree = data.draw(handles().filter(places))
    path, node = data.draw(st.sampled_from(places(tree)))
    bar = changed(spelt_out(tree), path, change)
    other = jnp.ones(1)
    # A tuple could be taken for one in the other order, which is another mistake.
    bars = Cotangents((bar,), None) if position == "input" else Cotangents((None,), bar)
    call = (other, tree) if position == "input" else (tree, other)
    with pytest.raises(CotangentError, match="cotangent of") as raised:
        gradients_under(bars, *call)
    name = "input 0" if position == "input" else "`variables`"
    shown = "".join(f"[{part!r}]" for part in (*path, *more)) or "its root"
    type_ = f"{node.dtype.name}{list(node.shape)}" if has_gradient(node) else ""
    assert message.format(path=shown, name=name, type=type_) in str(raised.value)


@examples(150)
@given(tree=any_tree(special))
def test_a_tree_taken_apart_is_put_together_again(tree):
    taken, layout = take_apart(tree)
    assert all(map(is_array, taken))
    assert_same(layout.fill(taken), tree)
    only = layout.fill_arrays_only(taken)
    assert_same(only, jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree))


FEW = st.sampled_from((3, True, 3.0, "relu", np.float32(3), jnp.float32(3)))


@examples(200)
@given(one=trees(FEW, 2), other=trees(FEW, 2))
def test_layouts_are_equal_just_where_trees_differ_in_arrays_alone(one, other):
    layout, others = take_apart(one)[1], take_apart(other)[1]
    describe = lambda leaf: "an array" if is_array(leaf) else f"{type(leaf)} {leaf}"
    assert (layout == others) is (jax.tree.map(describe, one) == jax.tree.map(describe, other))
    assert layout != others or hash(layout) == hash(others)


def spelt(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths_with_gradient(tree: Any) -> list[str]:
    return [spelt(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if has_gradient(leaf)]


def subsets(tree: Any, at_least: int, leave: int) -> Any:
    """Chooses some of a tree's differentiable leaves by their paths, and leaves some."""
    paths = paths_with_gradient(tree)
    if not paths:
        return st.just(set())
    return st.sets(st.sampled_from(paths), min_size=at_least, max_size=len(paths) - leave)


def filter_for(chosen: set[str]) -> Callable[[Any, Any], bool]:
    """Selects the chosen leaves, and those without a gradient, which must not matter."""
    return lambda path, leaf: "/".join(path) in chosen or not has_gradient(leaf)


@examples(100)
@given(data=st.data(), tree=any_tree(special))
def test_a_partition_is_put_together_again_around_other_variables(data, tree):
    chosen = data.draw(subsets(tree, at_least=0, leave=0))
    replaced = lambda new, old: jax.tree_util.tree_map_with_path(
        lambda path, leaf: new(leaf) if spelt(path) in chosen else old(leaf), tree
    )
    keep, drop, mark = (lambda leaf: leaf), (lambda leaf: None), (lambda leaf: "new")
    partition = Partition(tree, filter_for(chosen), True)
    variables, context = partition.take()
    assert_same(variables, replaced(keep, drop))
    assert_same(context, list(filter(is_array, jax.tree.leaves(replaced(drop, keep)))))
    assert_same(partition.combine(variables, context), tree)
    assert_same(partition.combine(jax.tree.map(mark, variables), context), replaced(mark, keep))


orders = st.sampled_from(("inputs_first", "variables_first"))
bare = st.one_of(arrays(special), st.sampled_from(PICKLED))


@st.composite
def whole_cotangents(draw: Any, leaf: Any) -> Cotangents:
    tree = trees(leaf, 3)
    keywords = draw(st.dictionaries(st.sampled_from("ab"), tree))
    return Cotangents(draw(st.lists(tree, max_size=3)), draw(tree), keywords=keywords, order=draw(orders))


def fields(bar: Cotangents) -> Any:
    return tuple(bar), bar.inputs, bar.variables, bar.keywords, {"order": bar.order}


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda bar: jax.tree.unflatten(jax.tree.structure(bar), jax.tree.leaves(bar)),
        lambda bar: jax.tree.map(lambda leaf: leaf, bar),
        lambda bar: pickle.loads(pickle.dumps(bar)),
        lambda bar: bar.replace(),
    ],
    ids=["flatten", "map", "pickle", "replace"],
)
@examples(40)
@given(bar=whole_cotangents(bare))
def test_cotangents_come_back_whole(there_and_back, bar):
    back = there_and_back(bar)
    assert type(back) is Cotangents
    assert jax.tree.structure(fields(back)) == jax.tree.structure(fields(bar))
    same = lambda a, b: bits(a) == bits(b) if is_array(b) else type(a) is type(b) and a == b
    assert jax.tree.all(jax.tree.map(same, fields(back), fields(bar)))


def pullback_of(call: Any) -> tuple[Any, Any]:
    mdl, inputs, keywords = call
    return crossvjp.vjp(mix, mdl, *inputs, **keywords)


def seed_of(y: Any, seed: int) -> Any:
    """Makes a cotangent of an output; it has `None` where the output has no gradient."""
    return jax.tree.map(lambda leaf: jnp.asarray(random(leaf, seed)) if has_gradient(leaf) else None, y)


@examples(10)
@given(call=calls(), seed=st.integers(0, 99))
def test_a_pullback_goes_in_and_out_of_compiled_programs(call, seed):
    y, pullback = pullback_of(call)
    y_bar = seed_of(y, seed)
    given_arrays, fill = separate(call, is_array)
    returned = jax.jit(lambda arrays: pullback_of(fill(arrays))[1])(given_arrays)
    assert_same(returned(y_bar), pullback(y_bar))
    assert_same(jax.jit(lambda pullback, y_bar: pullback(y_bar))(returned, y_bar), pullback(y_bar))


@examples(30)
@given(call=calls(), seed=st.integers(0, 99))
def test_the_cotangents_of_a_pullback_have_the_trees_of_the_call(call, seed):
    mdl = call[0]
    y, pullback = pullback_of(call)
    bar = pullback(seed_of(y, seed))
    describe = lambda leaf: (str(leaf.dtype), leaf.shape)
    expected = jax.tree.map(lambda leaf: describe(leaf) if has_gradient(leaf) else None, call)
    if isinstance(mdl, dict) and "params" in mdl:  # collections: the others' arrays are no parameters
        others = {name: jax.tree.map(lambda leaf: None, part) for name, part in mdl.items()}
        expected = (others | {"params": expected[0]["params"]}, *expected[1:])
    assert jax.tree.map(describe, (bar.variables, bar.inputs, bar.keywords)) == expected


class Never:
    """An object that has no `==`."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("has no ==")

    __hash__ = object.__hash__


class Unequal:
    """An object that equals nothing, like NaN."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


# Values that some `==` takes for each other. NumPy's between dtypes, their names and their classes is not
# transitive, so these are not put into containers, which compare by it.
NUMBERS = (0, 1, 1.0, True, 1 + 0j, math.nan, float("nan"), None)
OBJECTS = (Never(), Never(), Unequal(), Elementwise(), Elementwise(), Color.RED)
KINDS = (np.float32, np.dtype("float32"), "float32", b"float32")
FAMILIES = [family for bare in (NUMBERS, OBJECTS) for family in (bare, [(v,) for v in bare], [{v} for v in bare])]


@st.composite
def three_statics(draw: Any) -> list[Static]:
    family = draw(st.sampled_from((*FAMILIES, KINDS)))
    return [Static(draw(st.sampled_from(family))) for _ in range(3)]


@examples(500)
@given(statics=three_statics())
def test_equality_of_statics_is_an_equivalence(statics):
    a, b, c = statics
    assert a == Static(a.value)
    assert (a == b) is (b == a)
    assert not (a == b and b == c) or a == c
    assert a != b or hash(a) == hash(b)
    assert a != b or type(a.value) is type(b.value)


def double_by_functions(fn: Any, *, grad_vars: Any) -> Any:
    forward = lambda mdl, *args, **kwargs: crossvjp.vjp(fn, mdl, *args, grad_vars=grad_vars, **kwargs)
    return crossvjp.custom_vjp(fn, forward, doubled, grad_vars=grad_vars)


@pytest.mark.parametrize("lift", [double.lift, double_by_functions], ids=WRAPS)
@examples(15)
@given(data=st.data(), call=calls())
def test_a_filter_gives_the_rule_what_it_selects_and_leaves_the_rest(lift, data, call):
    handle, *others = call
    call = ([handle, jnp.ones(2, jnp.bfloat16), jnp.float32(2)], *others)  # two variables at least, so that one is left
    chosen = data.draw(subsets(call[0], at_least=1, leave=1))
    value, own = value_and_grads(mix, call)
    factors = [2 if path in chosen else 1 for path in paths_with_gradient(call[0])]
    factors += [1] * (len(own) - len(factors))  # of the inputs, which come behind the handle
    expected = [factor * leaf for factor, leaf in zip(factors, own, strict=True)]
    assert_same(value_and_grads(lift(mix, grad_vars=filter_for(chosen)), call), (value, expected))


@examples(30)
@given(call=calls(), seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_a_pullback_is_additive(call, seeds):
    y, pullback = pullback_of(call)
    one, other = (seed_of(y, seed) for seed in seeds)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    without_sign = lambda bar: jax.tree.map(lambda leaf: leaf + 0, bar)  # -0.0 + 0.0 is 0.0
    assert_same(without_sign(pullback(add(one, other))), without_sign(add(pullback(one), pullback(other))))


# Far from the smallest numbers of float32 and bfloat16, a power of two changes the exponent alone.
scalable = st.integers(-(2**20), 2**20).map(lambda number: number / 2**18)


@examples(30)
@given(call=calls(scalable), seed=st.integers(0, 99), exponent=st.integers(-8, 8))
def test_a_pullback_is_homogeneous(call, seed, exponent):
    y, pullback = pullback_of(call)
    y_bar = seed_of(y, seed)
    scale = lambda tree: jax.tree.map(lambda leaf: leaf * jnp.asarray(2.0**exponent, leaf.dtype), tree)
    assert_same(pullback(scale(y_bar)), scale(pullback(y_bar)))
