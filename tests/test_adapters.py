"""Our own adapters hold to the contract: each check of `check_adapter`, on the modules of each framework."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import identity, sign_gradient
from worlds import block_inputs

from crossvjp.testing import ADAPTER_CHECKS, TRANSPARENCY_CHECKS, Check, Subject, built_in_subjects

SUBJECTS = {subject.name: subject for subject in built_in_subjects() if "bfloat16" not in subject.name}
VALUES = "a handle of this framework is a value"
# JAX has no rule for the collectives of its batch norm on values that vary over shards.
UNDER_VMA = "the module itself raises "
NOT_APPLICABLE = {
    ("equinox block", "shard_map with check_vma"): UNDER_VMA,
    ("plain block", "handles are spent in the backward pass"): VALUES,
    ("plain mlp", "handles are spent in the backward pass"): VALUES,
    ("equinox block", "handles are spent in the backward pass"): VALUES,
    ("equinox mlp", "handles are spent in the backward pass"): VALUES,
    ("plain block", "a bound method"): "Partial has no method written in Python",
    ("plain mlp", "a bound method"): "Partial has no method written in Python",
}


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each framework's modules in turn."""
    return SUBJECTS[request.param]


@pytest.fixture(params=[name for name in SUBJECTS if name.endswith("block")])
def block(request: pytest.FixtureRequest) -> Subject:
    """The modules with state and dropout."""
    return SUBJECTS[request.param]


@pytest.mark.parametrize("check", TRANSPARENCY_CHECKS, ids=str)
def test_a_wrapped_block_is_the_unwrapped_one(block: Subject, check: Check):
    assert check(block).outcome == "passed"


@pytest.mark.parametrize("check", [each for each in ADAPTER_CHECKS if each not in TRANSPARENCY_CHECKS], ids=str)
def test_the_contract_holds(subject: Subject, check: Check):
    result = check(subject)
    reason = NOT_APPLICABLE.get((subject.name, check.name))
    assert result.outcome == ("passed" if reason is None else "not applicable")
    assert result.message.startswith(reason or "")


@pytest.mark.parametrize("rule", [identity, sign_gradient], ids=repr)
def test_differentiating_a_compiled_loss_gives_the_loss_itself(world, rule):
    """Dropout's mask too, which Flax's own transform draws anew: `test_peers.py`."""

    def loss(params, x, rest):
        out, after = world.run({"params": params, "rest": rest}, x, rule)
        return jnp.sum(out**2), (out, after)

    args = world.variables["params"], block_inputs(), world.variables["rest"]
    value, (out, _) = loss(*args)
    (again, (out_again, _)), _ = jax.value_and_grad(jax.jit(loss), has_aux=True)(*args)
    np.testing.assert_allclose(again, value, rtol=1e-6)  # compiled as a whole, it rounds otherwise
    np.testing.assert_array_equal(out_again == 0, out == 0)
    assert 0 < np.mean(out == 0) < 1


def test_dropout_draws_another_mask_for_another_key(world):
    """What would not change could not show that a mask is the same."""

    def out(rest):
        run = jax.grad(
            lambda x: (lambda y: (y.sum(), y))(world.run({**world.variables, "rest": rest}, x, identity)[0]),
            has_aux=True,
        )
        return run(block_inputs())[1] == 0

    other = jax.tree.map(_other_key, world.variables["rest"])
    assert (out(world.variables["rest"]) != out(other)).any()


def _other_key(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(leaf)[0]
    return leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) else leaf
