"""Packing, buckets and batch order."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay_jax.groups import batches, bucket, epoch_order, pack, pad_rows, padding_share, response_mask

END = 0  # the id that padding is written with, used as the end token too


def rows(*lengths, start=1):
    return [list(range(start, start + n)) for n in lengths]


# --- buckets


def test_buckets_are_few_monotone_and_fit():
    widths = [bucket(n) for n in range(1, 2049)]
    assert all(width >= n for n, width in enumerate(widths, 1))
    assert widths == sorted(widths)
    shapes = sorted(set(widths))
    assert shapes == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert len(shapes) == 16  # the docstring's number
    assert all(bucket(width) == width for width in shapes)


def test_bucket_padding_bound():
    for n in range(33, 20_000):
        assert 3 * (bucket(n) - n) < bucket(n), n
    # Up to 32 tokens the steps are eight wide.
    assert all(bucket(n) - n < 8 for n in range(1, 33))
    assert bucket(0) == 8


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_bucket_is_monotone_everywhere(a, b):
    low, high = sorted((a, b))
    assert low <= bucket(low) <= bucket(high)


# --- pack


def test_pack_shapes_and_contents():
    prompts = rows(3, 9)
    responses = [rows(1, 4, 0, start=5), rows(2, 17, 8, start=5)]
    group = pack(prompts, responses)
    assert group.prompt.shape == (2, 16) and group.responses.shape == (2, 3, 24)
    assert {leaf.dtype for leaf in group} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(group.prompt_lengths, [3, 9])
    np.testing.assert_array_equal(group.response_lengths, [[1, 4, 0], [2, 17, 8]])
    for b, k in itertools.product(range(2), range(3)):
        n = len(responses[b][k])
        assert group.responses[b, k, :n].tolist() == responses[b][k]
        assert not group.responses[b, k, n:].any()
    for b in range(2):
        assert group.prompt[b, : len(prompts[b])].tolist() == prompts[b]
        assert not group.prompt[b, len(prompts[b]) :].any()


def test_pack_takes_given_widths_and_numpy_rows():
    group = pack([np.array([1, 2])], [[np.array([3]), [4, 5]]], prompt_width=5, response_width=2)
    assert group.prompt.tolist() == [[1, 2, 0, 0, 0]]
    assert group.responses.tolist() == [[[3, 0], [4, 5]]]


def test_masks_go_by_length_where_pad_is_end_token():
    """Traps 2 and 3: the pad id is the end token, and end tokens stand inside prompts and responses."""
    prompts = [[END, 7, END], [END]]
    responses = [[[4, END], [END]], [[END, 5, END, END], []]]
    group = pack(prompts, responses)
    np.testing.assert_array_equal(group.prompt_lengths, [3, 1])
    lengths = np.array([[2, 1], [4, 0]])
    np.testing.assert_array_equal(group.response_lengths, lengths)
    np.testing.assert_array_equal(jax.jit(response_mask)(group), np.arange(8)[None, None, :] < lengths[..., None])


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], "one at least"),
        ([[1]], [], "as many prompts"),
        ([[1]], [[[1]], [[1]]], "as many prompts"),
        ([[1], []], [[[1]], [[1]]], "prompt 1 is empty"),
        ([[1], [2]], [[[1]], [[1], [2]]], "same number of responses"),
    ],
)
def test_pack_errors(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses)


def test_rows_longer_than_their_width_are_errors():
    with pytest.raises(ValueError):  # noqa: PT011 (NumPy's message)
        pack(rows(3), [rows(1)], prompt_width=2)
    with pytest.raises(ValueError):  # noqa: PT011
        pack(rows(3), [rows(5)], response_width=4)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(12, 15))
def test_pad_rows(lengths, width):
    padded, found = pad_rows(rows(*lengths), width)
    assert padded.shape == (len(lengths), width)
    assert found.tolist() == lengths
    np.testing.assert_array_equal(padded != 0, np.arange(width)[None] < found[:, None])


def test_padding_share():
    prompts, responses = rows(3, 9), [rows(1, 4), rows(2, 17)]
    group = pack(prompts, responses)
    positions = np.concatenate([group.prompt.ravel(), group.responses.ravel()])
    assert padding_share(group) == pytest.approx(np.mean(positions == 0))  # every real id here is positive
    assert padding_share(pack(rows(8), [rows(8)])) == 0.0


# --- order


def test_epoch_order_is_a_fixed_permutation():
    where = {"seed": 3, "round_index": 1, "epoch": 0}
    order = epoch_order(100, **where)
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    np.testing.assert_array_equal(order, epoch_order(100, **where))
    # Written down: runs that stopped under an older version go on in the same order.
    np.testing.assert_array_equal(epoch_order(8, **where), np.random.default_rng([3, 2, 0]).permutation(8))


def test_epoch_order_differs_by_seed_round_and_epoch():
    orders = {
        tuple(epoch_order(50, seed=seed, round_index=t, epoch=epoch))
        for seed, t, epoch in itertools.product(range(3), range(-1, 3), range(3))  # -1 is the SFT warm-up
    }
    assert len(orders) == 3 * 4 * 3


@given(st.integers(0, 40), st.integers(1, 12))
def test_batches_cover_an_order_once(count, size):
    order = epoch_order(count, seed=0, round_index=0, epoch=0)
    parts = list(batches(order, size))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert all(1 <= len(part) <= size for part in parts)
    np.testing.assert_array_equal(np.concatenate([*parts, np.zeros(0, int)]), order)
