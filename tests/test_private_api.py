"""Pins the private names of Flax and Haiku that the adapters use, so that an upgrade says what broke."""

from __future__ import annotations

import inspect
import types
from typing import Any

import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.linen import module as linen_module
from flax.linen import transforms
from flax.nnx.bridge import variables as bridge
from haiku._src import base, mixed_precision
from haiku._src import module as haiku_module
from haiku._src.data_structures import ThreadLocalStack
from haiku._src.lift import LiftingModule


def parameters(function) -> list[str]:
    """Lists the names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def test_linen_gives_and_takes_a_modules_scopes():
    assert parameters(transforms.get_module_scopes) == ["module", "args", "kwargs"]
    assert parameters(transforms.set_module_scopes) == ["module", "args", "kwargs", "scopes"]
    module = nn.Dense(3).bind(nn.Dense(3).init(jax.random.key(0), jnp.ones(2)))
    scopes, _, _ = transforms.get_module_scopes(module)
    assert scopes == [module.scope]
    clone, _, _ = transforms.set_module_scopes(module, (), {}, [scopes[0].rewound()])
    assert isinstance(clone, nn.Dense)
    assert clone.scope is not module.scope


def test_the_bridge_between_linen_and_nnx_turns_metadata_around():
    box = nn.Partitioned(jnp.ones((2, 3)), names=("in", "out"))
    with nnx.use_eager_sharding(False):
        variable = bridge.to_nnx_var("params", box)
    assert isinstance(variable, nnx.Param)
    assert not bridge.is_vanilla_variable(variable)
    again = bridge.to_linen_var(variable)
    assert isinstance(again, nn.Partitioned)
    assert again.names == ("in", "out")
    assert bridge.is_vanilla_variable(bridge.to_nnx_var("params", jnp.ones(2)))


def test_linen_modules_export_and_reimport_their_position():
    module = nn.Dense(3).bind({})
    exported = module._state.export()
    exported.autoname_cursor["Dense"] = 2
    module._state.reimport(exported)
    assert module._state.autoname_cursor == {"Dense": 2}


def test_linen_keeps_its_dynamic_context_where_we_look():
    assert linen_module._global_interceptor_stack._storage == []
    assert linen_module._context.capture_stack == []
    assert linen_module._context.module_stack == [None]


def test_linens_jit_looks_up_programs_by_a_fingerprint_that_we_may_extend(monkeypatch):
    asked = []
    own = transforms._module_fingerprint

    def asking(module):
        asked.append(module.name)
        return own(module)

    monkeypatch.setattr(transforms, "_module_fingerprint", asking)
    nn.Sequential([nn.jit(nn.Dense)(3), nn.jit(nn.Dense)(3)]).init(jax.random.key(0), jnp.ones(2))
    assert asked == ["layers_0", "layers_1"]


def test_linen_runs_the_interceptors_that_are_listed_the_last_one_innermost():
    order = []

    def interceptor(name):
        def intercept(next_fun, args, kwargs, context):
            assert isinstance(context.orig_method.func, types.FunctionType)  # takes the module first
            order.append(name)
            return next_fun(*args, **kwargs)

        return intercept

    with nn.intercept_methods(interceptor("outer")), nn.intercept_methods(interceptor("inner")):
        stack = linen_module._global_interceptor_stack
        for first in (0, 1):
            everything, stack._storage = stack._storage, stack._storage[first:]
            linen_module.run_interceptors(lambda mdl: order.append("method"), nn.Dense(3))
            stack._storage = everything
    assert order == ["outer", "inner", "method", "inner", "method"]


def test_linen_scopes_are_built_as_we_build_them():
    expected = ["self", "variables", "rngs", "name", "mutable", "parent", "path", "debug_path", "flags"]
    assert parameters(flax.core.Scope.__init__) == expected
    scope = flax.core.Scope({"params": {}}, {"dropout": jax.random.key(0)})
    assert scope.rng_counters == {"dropout": 0}
    assert scope.root._variables is scope._variables
    child = scope.push("child", reuse=True)
    assert child.rng_counters in scope.rng_counters.values()


STACKS = [
    base.context_stack,
    base.frame_stack,
    base.param_creator_stack,
    base.state_creator_stack,
    base.param_getter_stack,
    base.state_getter_stack,
    base.state_setter_stack,
    base.closure_boundary_stack,
    haiku_module.interceptor_stack,
]


@pytest.mark.parametrize("stack", STACKS, ids=range(len(STACKS)))
def test_haiku_keeps_its_context_on_thread_local_stacks(stack):
    assert isinstance(stack, ThreadLocalStack)
    assert stack.clone()._storage == stack._storage


def test_haiku_keeps_the_current_policy_where_we_look():
    assert len(mixed_precision._thread_local_state._current_policy) == 0


def test_haiku_knows_every_stack_that_we_set():
    """A new stack in Haiku would be one that late runs lose."""
    known = {id(stack) for stack in STACKS}
    found = {name for name, value in vars(base).items() if isinstance(value, ThreadLocalStack)}
    assert {name for name in found if id(getattr(base, name)) not in known} == set()


def test_haiku_frames_have_the_fields_that_we_copy():
    expected = (
        "params state rng_stack freeze_params module_stack counter_stack used_names_stack jax_trace_stack frame_id"
    )
    assert base.Frame._fields == tuple(expected.split())
    assert parameters(base.Frame.evolve) == ["self", "params", "state", "rng", "decoupled"]

    def look():
        frame: Any = base.current_frame()
        evolved = frame.evolve({}, {}, None)
        assert len(evolved.counter_stack) == len(frame.counter_stack)
        assert evolved.counter_stack.peek() is not frame.counter_stack.peek()
        key, subkeys = frame.rng_stack.peek().internal_state
        assert base.PRNGSequence((key, subkeys)).internal_state[0] is key

    hk.transform(look).init(jax.random.PRNGKey(0))


def test_haiku_lifting_modules_say_which_prefix_they_read():
    def look():
        hk.lift(lambda *_: {}, name="lifted")
        assert LiftingModule(lambda: None, name="lifted").prefix_name == "lifted_1"

    hk.transform(look).init(jax.random.PRNGKey(0))


def test_nnx_keeps_its_own_attributes_under_one_prefix_and_lists_in_attributes():
    """`_nnx_structure.py` reads a module's attributes, and must tell NNX's own from the user's."""

    class Net(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(2))
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
            self._own = 3

    net = Net()
    assert {name for name in vars(net) if not name.startswith("_pytree__")} == {"scale", "layers", "_own"}
    assert any(value is net.layers[0] for value in vars(net.layers).values())
