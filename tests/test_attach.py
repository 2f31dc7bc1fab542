"""`attach`: what holds for the unedited models of all frameworks."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, Model
from rules import identity

import crossvjp as cv
from crossvjp.rules import GuidedBackprop
from crossvjp.testing import assert_close, assert_same_bits, one_by_one


class Times(cv.Rule):
    """Multiplies the gradient of the parameters."""

    factor: Any = 2.0

    def backward(self, call, y_bar):
        """Scales it."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: self.factor * g, bar.variables))


class Sign(cv.Rule):
    """Takes the sign of the gradient of the parameters."""

    linear = False

    def backward(self, call, y_bar):
        """Gives zero for zero, which JAX's coming custom_vjp pulls back too."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(jnp.sign, bar.variables))


class Noise(cv.Rule):
    """Replaces the gradient of the parameters by noise."""

    linear = False

    def backward(self, call, y_bar):
        """Draws it."""
        bar = call.pullback(y_bar)
        return bar.replace(variables=jax.tree.map(lambda g: jax.random.normal(call.key, g.shape), bar.variables))


AROUND = {"eager": lambda loss: loss, "jit inside": jax.jit, "remat": jax.checkpoint}


@pytest.fixture(params=sorted(MODELS))
def made(request: pytest.FixtureRequest) -> Model:
    """Each framework's model in turn."""
    return MODELS[request.param]()


@pytest.mark.parametrize("around", sorted(AROUND))
def test_the_identity_everywhere_changes_nothing(made, around):
    attached = cv.attach(made.model, identity, where=True)
    results = [made.value_and_grad(model, AROUND[around]) for model in (attached, made.model)]
    assert_close(*results)  # XLA fuses around what leaves the program, and adds in another order
    operations = [made.value_and_grad(model, AROUND[around], one_by_one) for model in (attached, made.model)]
    assert_same_bits(*operations)


@pytest.mark.parametrize("layer", ["first", "twice", "head"])
@pytest.mark.parametrize("around", ["eager", "jit inside"])
def test_a_rule_on_one_layer_changes_its_gradient_and_no_other(made, layer, around):
    attached = cv.attach(made.model, Times(), where=layer)
    y, state, bars = made.value_and_grad(attached, AROUND[around], one_by_one)
    own_y, own_state, own = made.value_and_grad(made.model, AROUND[around], one_by_one)
    assert_same_bits((y, state), (own_y, own_state))
    own[layer] = [2.0 * bar for bar in own[layer]]
    assert_same_bits(bars, own)


def scaled_layers(made: Model, attached: Any) -> set[str]:
    """Lists the layers whose gradient is twice the model's own; the others' must be as they were."""
    bars, own = made.value_and_grad(attached)[2], made.value_and_grad(made.model)[2]
    found = {layer for layer in own if jnp.allclose(bars[layer][0], 2 * own[layer][0])}
    assert_close({k: v for k, v in bars.items() if k not in found}, {k: v for k, v in own.items() if k not in found})
    return found


WHERE = {
    "glob": ("t*", {"twice"}),
    "regex": (re.compile("^(head|first)$"), {"head", "first"}),
    "predicate": (lambda path, module: path == ("head",), {"head"}),
    "tuple": (("head", re.compile("fir")), {"head", "first"}),
}


@pytest.mark.parametrize("name", sorted(WHERE))
def test_where_chooses_by_path_in_every_framework(made, name):
    where, layers = WHERE[name]
    assert scaled_layers(made, cv.attach(made.model, Times(), where=where)) == layers


def test_where_chooses_by_class(made):
    assert scaled_layers(made, cv.attach(made.model, Times(), where=made.dense)) == {"first", "twice", "head"}


def test_of_pairs_the_first_that_matches_wins_and_none_leaves_a_module_alone(made):
    pairs = [("first", None), ("t*", Times(1.0)), (made.dense, Times()), ("first", Times())]
    assert scaled_layers(made, cv.attach(made.model, where=pairs)) == {"head"}


def test_a_function_in_the_place_of_a_rule_gives_each_module_its_own(made):
    rule = lambda path, module: Times(2.0) if path[-1] == "head" else None
    assert scaled_layers(made, cv.attach(made.model, rule, where=made.dense)) == {"head"}


KERNEL = {
    "linen": lambda module: module.variables["params"]["kernel"],
    "nnx": lambda module: module.kernel[...],
    "haiku": lambda module: module.params_dict()[f"{module.module_name}/w"],
    "equinox": lambda module: module.weight,
    "function": lambda module: module.variables["params"]["kernel"],
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_function_that_gives_rules_sees_the_variables_of_each_call(name):
    made = MODELS[name]()
    size = lambda module: jax.lax.stop_gradient(jnp.max(jnp.abs(KERNEL[name](module))))
    attached = cv.attach(made.model, lambda path, module: Times(size(module)), where="head")
    sizes = []
    for scale in (1.0, 3.0):
        now = dataclasses.replace(made, params=jax.tree.map(lambda leaf, scale=scale: scale * leaf, made.params))
        (_, _, plain), (_, _, bars) = now.value_and_grad(made.model), now.value_and_grad(attached)
        sizes += [bar.sum() / own.sum() for bar, own in zip(bars["head"], plain["head"], strict=True)]
    assert_close(sizes[2:], [3 * one for one in sizes[:2]], rtol=1e-5)  # quotients of rounded sums
    assert not np.allclose(sizes[0], 1.0)


def test_a_second_attachment_is_added_to_the_first(made):
    once = cv.attach(made.model, Times(), where="first")
    assert scaled_layers(made, cv.attach(once, Times(), where="head")) == {"first", "head"}
    assert scaled_layers(made, once) == {"first"}


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
def test_nested_matches_compose_and_the_outer_rule_gets_what_the_inner_one_gave(name):
    made = MODELS[name]()
    attached = cv.attach(made.model, where=[("head", Sign()), ("", Times(3.0))])
    bars, own = made.value_and_grad(attached)[2], made.value_and_grad(made.model)[2]
    assert_close(bars["head"], [3 * jnp.sign(bar) for bar in own["head"]])
    assert_close(bars["first"], [3 * bar for bar in own["first"]])


def test_the_model_that_was_given_is_not_changed(made):
    before = made.value_and_grad(made.model)
    cv.attach(made.model, Times(), where=True)
    assert_same_bits(made.value_and_grad(made.model), before)


def test_detach_gives_the_plain_model_back(made):
    attached = cv.attach(cv.attach(made.model, Times(), where="head"), Times(), where="first")
    plain = cv.detach(attached)
    assert type(plain) is type(made.model)
    assert_same_bits(made.value_and_grad(plain), made.value_and_grad(made.model))
    assert cv.detach(made.model) is made.model or jax.tree.structure(cv.detach(made.model)) == jax.tree.structure(
        made.model
    )


def test_rules_are_off_inside_of_rules_off_and_on_behind_it(made):
    attached = cv.attach(made.model, Times(), where=True)
    own = made.value_and_grad(made.model)
    with cv.rules_off():
        assert_same_bits(made.value_and_grad(attached), own)
    assert scaled_layers(made, cv.attach(made.model, Times(), where="head")) == {"head"}


def test_what_jit_compiled_with_rules_does_not_serve_without_them(made):
    attached = cv.attach(made.model, Times(), where="head")
    bars = jax.jit(lambda params: jax.grad(lambda params: jnp.sum(made.run(attached, params)[0]))(params))
    with_rules = bars(made.params)
    with cv.rules_off():
        without = bars(made.params)
    assert_close(bars(made.params), with_rules)
    head = lambda tree: [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "head" in str(path)]
    assert_close(head(with_rules), [2 * bar for bar in head(without)])


def test_a_learned_field_of_an_attached_rule_gets_its_gradient(made):
    class Learned(cv.Rule):
        factor: Any

        def backward(self, call, y_bar):
            bar = call.pullback(y_bar)
            return bar.with_fields(factor=jnp.sum(jnp.stack([jnp.sum(bar) for bar in jax.tree.leaves(y_bar)])))

    def loss(factor: Any) -> Any:
        attached = cv.attach(made.model, Learned(factor), where="head")
        return jnp.sum(made.run(attached, made.params)[0])

    y = made.run(made.model, made.params)[0]
    assert_close(jax.grad(loss)(1.0), jnp.float32(y.size))


def test_a_key_is_another_one_at_each_path_and_the_same_in_each_run(made):
    attached = cv.attach(made.model, Noise(), where=made.dense, key=jax.random.key(3))
    first, again = made.value_and_grad(attached)[2], made.value_and_grad(attached, jax.jit)[2]
    assert_close(first, again)
    ones = [jnp.ravel(first[layer][0])[:3] for layer in ("first", "twice", "head")]
    assert not jnp.allclose(ones[0], ones[1])
    assert not jnp.allclose(ones[1], ones[2])


def test_attached_models_run_in_several_threads_at_once(made):
    attached = cv.attach(made.model, Times(), where="head")

    def use(index: int) -> Any:
        if index % 2:
            return made.value_and_grad(attached)[2]
        with cv.rules_off():
            return made.value_and_grad(attached)[2]

    own = made.value_and_grad(made.model)[2]
    with ThreadPoolExecutor(4) as pool:
        for index, bars in enumerate(pool.map(use, range(4))):
            assert_close(bars["head"], [(1 + index % 2) * bar for bar in own["head"]])


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_attached_models_are_attached(name, how):
    made = MODELS[name]()
    attached = how(cv.attach(made.model, Times(), where="head"))
    assert scaled_layers(made, attached) == {"head"}


def words(text: str) -> Iterator[list[str]]:
    """Splits the lines of a table into words."""
    return (line.split() for line in text.splitlines())


def test_sites_lists_every_call_with_its_rule(made):
    rows = cv.sites(cv.attach(made.model, Times(), where="twice"), *made.sample)
    found = {row.path: row for row in rows}
    assert found["twice"].calls == 2
    assert found["twice"].rule == Times()
    assert found["twice"].kind == made.dense.__name__
    assert sorted(shape for shape, _ in found["twice"].parameters.values()) == [(6,), (6, 6)]
    assert found["head"].rule is None
    assert found["relu"].kind == "named function"
    assert ["path", "class", "method", "calls", "parameters", "rule"] in list(words(str(rows)))


def test_guided_backpropagation_reaches_the_relu_of_an_unedited_model(made):
    attached = cv.attach(made.model, GuidedBackprop(), where=cv.function("relu"))
    y, state, bars = made.value_and_grad(attached)
    own_y, own_state, own = made.value_and_grad(made.model)
    assert_close((y, state), (own_y, own_state))
    assert_close(bars["head"], own["head"])
    assert not jnp.allclose(bars["first"][0], own["first"][0])
    assert cv.sites(attached, *made.sample)[-1] is not None


def test_a_choice_that_matches_nothing_lists_what_there_is(made):
    with pytest.raises(cv.ArgumentError, match=r"'haed' matches nothing.*'head' \((Dense|Linear)\)"):
        made.value_and_grad(cv.attach(made.model, Times(), where="haed"))
    with pytest.raises(cv.ArgumentError, match=r"function\('rleu'\) matches nothing.*'relu'"):
        made.value_and_grad(cv.attach(made.model, Times(), where=cv.function("rleu")))
    own = made.value_and_grad(made.model)
    assert_same_bits(made.value_and_grad(cv.attach(made.model, Times(), where="haed", must_match=False)), own)


def test_two_attachments_to_one_call_are_refused(made):
    with pytest.raises(cv.ArgumentError, match=r"'head' of class \w+ has two rules, Times.*Sign.*compose.*detach"):
        made.value_and_grad(cv.attach(cv.attach(made.model, Times(), where="head"), Sign(), where=made.dense))
