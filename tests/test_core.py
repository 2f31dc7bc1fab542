"""The neutral parts of the core, each by itself."""

from __future__ import annotations

import ast
import contextlib
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from rules import identity

import crossvjp
from crossvjp import Cotangents
from crossvjp.testing import assert_close

ROOT = pathlib.Path(__file__).parents[1]


def test_cotangents_unpack_as_documented_and_have_names():
    bar = Cotangents((1.0, 2.0), {"w": 3.0})
    assert tuple(bar) == (1.0, 2.0, {"w": 3.0})
    *inputs, variables = bar
    assert (inputs, variables) == ([1.0, 2.0], {"w": 3.0})
    assert bar.inputs == (1.0, 2.0)
    assert bar.replace(inputs=(4.0, 5.0)) == (4.0, 5.0, {"w": 3.0})
    assert tuple(Cotangents((1.0,), 2.0, order="variables_first")) == (2.0, 1.0)


def test_cotangents_are_a_pytree_that_prints_and_pickles():
    bar = Cotangents((1.0,), {"w": 3.0}, keywords={"scale": 4.0}, order="variables_first")
    doubled = jax.tree.map(lambda leaf: 2 * leaf, bar)
    assert isinstance(doubled, Cotangents)
    assert (doubled.inputs, doubled.variables, doubled.keywords) == ((2.0,), {"w": 6.0}, {"scale": 8.0})
    assert tuple(doubled) == ({"w": 6.0}, 2.0)
    assert "keywords={'scale': 4.0}" in repr(bar)
    copy = pickle.loads(pickle.dumps(bar))
    assert (tuple(copy), copy.keywords, copy.order) == (tuple(bar), bar.keywords, bar.order)


WRONG: Any = (jnp.ones(2), None, "flax")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cotangents(*WRONG[:2]), r"`inputs` must be a tuple.*Write \(x_bar,\) for a single input"),
        (lambda: Cotangents((), None, order=WRONG[2]), "`order` must be"),
        (lambda: Cotangents((), None).replace(params=1), "`keywords` and `fields`, but got params"),
    ],
    ids=["inputs", "order", "replace"],
)
def test_cotangents_refuse_what_they_cant_hold(make, message):
    with pytest.raises(crossvjp.ArgumentError, match=message):
        make()


def conform(tree: Any, bar: Any) -> Any:
    """Returns the gradient of a tree's sum under a rule that gives `bar` for the variables."""
    rule = crossvjp.rule(lambda call, y_bar: (None, bar))
    fn = rule.lift(lambda tree, x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)) * x)
    return jax.grad(lambda tree: fn(tree, jnp.array(1.0)).real)(tree)


TREE = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}


@pytest.mark.parametrize(
    ("bar", "a", "c"),
    [
        (None, 0, 0),
        ({"a": None, "b": None}, 0, 0),
        ({"a": jnp.full(2, 5.0), "b": None}, 5, 0),
        ({"a": np.full(2, 5.0, np.float64), "b": {"c": jnp.full(3, 6, jnp.int32)}}, 5, 6),
        (flax.core.freeze({"a": jnp.full(2, 5.0), "b": {"c": jnp.full(3, 6.0)}}), 5, 6),
        (nnx.State({"a": jnp.full(2, 5.0), "b": {"c": nnx.Param(jnp.full(3, 6.0))}}), 5, 6),
    ],
    ids=["none", "nones", "partial", "dtypes", "FrozenDict", "State"],
)
def test_cotangents_are_forgiven_their_containers_and_dtypes(bar, a, c):
    got = conform(TREE, bar)
    np.testing.assert_array_equal(got["a"], jnp.full(2, float(a)))
    np.testing.assert_array_equal(got["b"]["c"], jnp.full(3, float(c)))


def test_a_python_number_is_a_cotangent_of_a_scalar():
    np.testing.assert_array_equal(conform(jnp.array(1.0), 5), jnp.array(5.0))


def test_numpy_bfloat16_parameters_have_a_gradient():
    rule = crossvjp.rule(lambda call, y_bar: call.pullback(y_bar))
    y, pullback = crossvjp.vjp(lambda w, x: w * x, np.ones(2, ml_dtypes.bfloat16), jnp.ones(2, jnp.bfloat16))
    assert pullback(y).variables.dtype == jnp.bfloat16
    assert rule.lift(lambda w, x: w * x)(np.ones(2, ml_dtypes.bfloat16), jnp.ones(2, jnp.bfloat16)).shape == (2,)


def test_arrays_without_gradient_are_context():
    tree = {"w": jnp.ones(2), "steps": jnp.array(3), "key": jax.random.key(0), "none": None}
    _, pullback = crossvjp.vjp(lambda tree, x: tree["w"] * tree["steps"] * x, tree, jnp.array(2.0))
    bar = pullback(jnp.ones(2))
    assert bar.variables["steps"] is None
    assert bar.variables["key"] is None
    np.testing.assert_array_equal(bar.variables["w"], jnp.full(2, 6.0))


def test_a_pullback_takes_none_and_parts_of_it_for_zero():
    _, pullback = crossvjp.vjp(lambda w, x: {"y": w * x, "z": w + x, "n": 3}, jnp.array(2.0), jnp.array(3.0))
    np.testing.assert_array_equal(pullback(None).variables, 0.0)
    np.testing.assert_array_equal(pullback({"y": 1.0, "z": None, "n": None}).variables, 3.0)


def test_a_pullback_is_a_pytree_that_crosses_jit():
    forward = jax.jit(lambda w: crossvjp.vjp(lambda w, x: jnp.sin(w) * x, w, jnp.array(3.0)))
    y, pullback = forward(jnp.array(2.0))
    np.testing.assert_allclose(jax.jit(lambda p, y_bar: p(y_bar))(pullback, y), pullback(y), rtol=1e-6)


def test_the_forward_value_is_that_of_jax_vjp():
    """A second plain run may differ by rounding; here the derivative rule's value differs by more, to be seen."""

    @jax.custom_jvp
    def square(x):
        return x * x

    @square.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return x * x * (1 + 1e-3), 2 * x * t

    w = jnp.array(1.1)
    rule = crossvjp.rule(lambda call, y_bar: call.pullback(y_bar))
    value, _ = jax.value_and_grad(rule.lift(lambda w, x: square(w) * x))(w, jnp.array(1.0))
    own, _ = jax.value_and_grad(lambda w: square(w))(w)
    assert float(value) == float(own) != float(square(w))


class Box:
    """A module of a framework that nobody else knows: a mutable cell."""

    def __init__(self, value: Any):
        self.value = value


class BoxBoundary:
    """Its boundary."""

    def __init__(self, box: Box):
        self._box, self.variables, self.context = box, {"value": box.value}, {}

    def call(self, fn, variables, context, *args, **kwargs):
        box = Box(variables["value"])
        out = fn(box, *args, **kwargs)
        return out, {} if box.value is variables["value"] else {"value": box.value}

    def closed(self):
        return contextlib.nullcontext()


class BoxAdapter:
    """Its adapter."""

    name = "Box"
    by_reference = True
    finds_closures = False

    def matches(self, mdl):
        return isinstance(mdl, Box)

    def initializing(self, mdl):
        return False

    def channel(self, mdl, name, initial):
        return getattr(mdl, name)

    def lift(self, mdl, grad_vars, body):
        out, updates = body(BoxBoundary(mdl))
        if updates:
            mdl.value = updates["value"]
        return out


def test_a_third_partys_adapter_is_one_small_class():
    with pytest.raises(crossvjp.HandleError, match="must be a module of"):
        crossvjp.vjp(lambda box, x: box.value * x, Box(jnp.array(2.0)), jnp.array(3.0))
    crossvjp.register_adapter(BoxAdapter())
    box = Box(jnp.array(2.0))

    def fn(box, x):
        box.value = box.value + 1
        return box.value * x

    y, pullback = crossvjp.vjp(fn, box, jnp.array(3.0))
    assert float(y) == 9.0
    assert float(box.value) == 3.0
    assert float(pullback(jnp.array(1.0)).variables["value"]) == 3.0
    rule = crossvjp.rule(lambda call, y_bar: call.pullback(10 * y_bar))
    assert float(jax.grad(lambda x: rule.lift(fn)(Box(jnp.array(2.0)), x))(jnp.array(1.0))) == 30.0


def imported_by(path: pathlib.Path) -> set[str]:
    """Lists the top-level packages that a file imports, with `jax._src` apart."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        found |= {"jax._src" if name.startswith("jax._src") else name.split(".")[0] for name in names}
    return found


FORBIDDEN = {"flax", "haiku", "equinox", "optax", "jax._src"}


def test_the_core_imports_no_framework_and_nothing_private_of_jax():
    files = list((ROOT / "core").glob("**/*.py"))
    assert len(files) > 10
    assert {path.name: imported_by(path) & FORBIDDEN for path in files if imported_by(path) & FORBIDDEN} == {}


def test_the_check_of_imports_catches_a_framework(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import os\nfrom jax._src import core\ndef f():\n    import flax.linen\n")
    assert imported_by(wrong) & FORBIDDEN == {"jax._src", "flax"}


def test_importing_crossvjp_imports_nothing_that_takes_long():
    """It takes some 40 ms beside jax, where these would take 70 more; what needs them imports them when it runs."""
    program = "import jax, sys; before = set(sys.modules); import crossvjp; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "crossvjp._rule" in found
    assert [name for name in found if not name.startswith("crossvjp")] == []
    assert not {"crossvjp.migration", "crossvjp.testing", "crossvjp.rules", "crossvjp.adapters"} & {*found}


def test_what_is_imported_late_is_there():
    assert crossvjp.migrate is crossvjp.migration.migrate
    assert {"migrate", "migration", "rule"} <= {*dir(crossvjp)}
    with pytest.raises(AttributeError, match="module 'crossvjp' has no attribute 'migrat'"):
        _ = crossvjp.migrat


PRIVATE = ("haiku._src", "flax.linen.transforms", "flax.linen.module", "jax._src")


def private_modules_of(path: pathlib.Path) -> set[str]:
    """Lists the private modules that a file imports; it may name others in strings, as an unpickler has to."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {private for private in PRIVATE for name in names if f"{name}.".startswith(f"{private}.")}
    return found


def test_private_framework_api_stays_in_two_files():
    files = list((ROOT / "adapters").glob("**/*.py"))
    private = {path.name for path in files if private_modules_of(path)}
    assert private == {"_haiku_frames.py", "_linen_modules.py"}


def test_the_check_of_private_modules_catches_one(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from haiku import _src\nfrom flax.linen import module as m\nnamed = 'jax._src.array'\n")
    assert private_modules_of(wrong) == {"haiku._src", "flax.linen.module"}


@pytest.mark.parametrize(("dtype", "passes", "fails"), [("float32", 5e-7, 5e-6), ("bfloat16", 0.03, 0.2)])
def test_the_comparison_is_as_fine_as_the_dtype(dtype, passes, fails):
    """To eight spacings of numbers at the largest entry."""
    largest = jnp.ones(2, dtype)
    assert_close(largest * jnp.asarray(1 + passes, dtype), largest)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_close(largest * jnp.asarray(1 + fails, dtype), largest)


def test_a_compiled_layer_that_is_used_twice_keeps_what_each_use_needs():
    layer = lambda fn: jax.jit(lambda w, x: jnp.tanh(fn(w, x)))
    ruled, plain = layer(identity.lift(lambda w, x: x @ w)), layer(lambda w, x: x @ w)
    w = [jax.random.normal(jax.random.key(seed), (3, 3)) for seed in range(3)]
    x = jnp.ones((2, 3))  # not differentiated, so that the first use needs other residuals than the others
    loss = lambda layer: lambda w: jnp.sum(layer(w[2], layer(w[1], layer(w[0], x))) ** 2)
    assert_close(jax.grad(loss(ruled))(w), jax.grad(loss(plain))(w))
    assert_close(jax.grad(jax.jit(loss(ruled)))(w), jax.grad(loss(plain))(w))
