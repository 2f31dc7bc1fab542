"""Pieces of conversions: they lose nothing, and their linear part is their derivative."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossvjp.migration import (
    AddConstant,
    Concatenate,
    Flip,
    Identity,
    Negate,
    Rearrange,
    ReorderBlocks,
    Reshape,
    Split,
    Transpose,
)

SHAPE = (4, 6, 2)
EXACT = st.one_of(
    st.just(Identity()),
    st.permutations(range(3)).map(lambda axes: Transpose(tuple(axes))),
    st.sampled_from([(24, 2), (4, 12), (48,), (2, 2, 6, 2), (4, 1, 6, 2), (8, 6)]).map(
        lambda after: Reshape(SHAPE, after)
    ),
    st.sets(st.integers(0, 2)).map(lambda axes: Flip(tuple(sorted(axes)))),
    st.permutations(range(3)).map(lambda order: ReorderBlocks(1, tuple(order))),
    st.permutations(range(3)).map(lambda order: ReorderBlocks(1, tuple(order), (1, 3, 2))),
    st.tuples(st.booleans(), st.booleans()).map(lambda negated: Negate(0, negated)),
    st.integers(0, 6).map(lambda size: Split(1, (size, 6 - size))),
    st.just(Concatenate(2, (2, 2))),
    st.just(Rearrange((1, 0))),
)
ADDING = st.tuples(st.floats(-2, 2), st.just(0.0)).map(lambda constants: AddConstant(0, constants))
ANY = st.one_of(EXACT, ADDING)


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    both = draw.normal(size=(2, *SHAPE)).astype(np.float32)
    both[:, 0, 0, 0] = -0.0, np.nan  # signs of zeros and payloads count as bits
    return both[0], both[1]


def bits(of: tuple) -> list[bytes]:
    return [np.asarray(array).tobytes() for array in of]


@given(EXACT)
@settings(deadline=None)
def test_a_piece_and_its_inverse_give_every_bit_back(piece):
    for made in (arrays(), tuple(map(jnp.asarray, arrays()))):
        assert bits(piece.inverse()(piece(made))) == bits(made)


@given(ANY)
def test_the_inverse_of_the_inverse_is_the_piece(piece):
    assert piece.inverse().inverse() == piece
    assert piece.linear().linear() == piece.linear()


@given(ANY)
@settings(deadline=None, max_examples=30)
def test_the_linear_part_is_the_derivative(piece):
    primals, tangents = (tuple(map(jnp.asarray, arrays(seed))) for seed in (1, 2))
    _, derivative = jax.jvp(piece, (primals,), (tangents,))
    assert bits(derivative) == bits(piece.linear()(tangents))


@given(ANY)
def test_the_absolute_part_is_the_linear_part_without_signs(piece):
    moved = piece.linear()(tuple(map(np.square, arrays(1))))
    assert bits(tuple(map(np.abs, moved))) == bits(piece.absolute()(tuple(map(np.square, arrays(1)))))


@given(ANY)
@settings(deadline=None, max_examples=30)
def test_a_piece_does_the_same_to_traced_arrays(piece):
    made = tuple(map(jnp.asarray, arrays(1)))
    for traced, eager in zip(jax.jit(piece)(made), piece(made), strict=True):
        np.testing.assert_array_equal(traced, eager)


@given(st.permutations(range(3)))
def test_names_go_where_their_axes_go(axes):
    named = Transpose(tuple(axes)).names((("a", "b", "c"), None))
    assert named == (tuple("abc"[axis] for axis in axes), None)


@given(EXACT)
def test_names_that_nobody_else_merges_come_back(piece):
    names = ((None, "b", "c"), (None, "b", "c"))
    back = piece.inverse().names(piece.names(names))
    for axes in back:
        assert all(name in (None, kept) for name, kept in zip(axes, names[0], strict=True))


@pytest.mark.parametrize(
    ("before", "after", "names", "renamed"),
    [
        ((4, 6, 2), (24, 2), ("a", "b", "c"), (("a", "b"), "c")),
        ((24, 2), (4, 6, 2), (("a", "b"), "c"), ("a", "b", "c")),
        ((4, 6, 2), (24, 2), ("a", None, "c"), ("a", "c")),
        ((4, 6, 2), (24, 2), (None, "b", "c"), (None, "c")),
        ((24,), (4, 6), ("a",), ("a", None)),
        ((1, 1, 6), (6,), (None, None, "c"), ("c",)),
        ((6,), (6, 1, 1), ("c",), ("c", None, None)),
        ((0, 3), (0,), ("a", None), (None,)),
    ],
)
def test_a_reshape_names_merged_axes_as_a_partition_spec_does(before, after, names, renamed):
    assert math.prod(before) == math.prod(after)
    assert Reshape(before, after).names((names,)) == (renamed,)


def test_joined_arrays_keep_the_names_that_they_agree_on():
    assert Concatenate(0, (1, 1)).names((("a", "b"), ("a", "c"))) == (("a", None),)
    assert Concatenate(0, (1, 1)).names((("a", "b"), None)) == (None,)
    assert Split(0, (1, 1)).names((("a", "b"),)) == (("a", "b"), ("a", "b"))


def test_a_constant_leaves_the_other_blocks_untouched_bit_for_bit():
    zeros = np.array([-0.0, -0.0], np.float32)
    (added,) = AddConstant(0, (0.0, 1.0))((zeros,))
    assert np.signbit(added).tolist() == [True, False]


def test_pieces_act_on_the_array_that_they_name():
    first, second = np.arange(3.0), np.arange(4.0)
    pieces = [Flip((0,), 1), ReorderBlocks(0, (1, 0), None, 1), Negate(0, (True,), 1), AddConstant(0, (1.0,), 1)]
    for piece in pieces:
        kept, changed = piece((first, second))
        assert kept is first
        assert changed.tolist() != second.tolist()
    assert [part.tolist() for part in Split(0, (1, 3), 1)((first, second))[1:]] == [[0.0], [1.0, 2.0, 3.0]]
    assert [len(part) for part in Concatenate(0, (3, 4))((first, second, first))] == [7, 3]
    assert list(itertools.chain(*Rearrange((1, 0))((first, second)))) == [0, 1, 2, 3, 0, 1, 2]
