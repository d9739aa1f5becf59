"""A group: one prompt and its K responses, padded to a bucket. Everything that is trained or scored is a batch of
groups.

Token ids are right-padded with 0 and every mask is made from lengths, never from ids, so a pad id that equals an end
token, or an end token inside a prompt, means nothing here.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Sources of responses: the annotated answers, the dispreferred answers of preference data, and 0, 1, ...: the responses
# of that round.
TARGET, REJECTED = -1, -2

Tokens = Sequence[int] | np.ndarray
Array = Any  # np.ndarray where batches are made, jax.Array inside jitted functions


class Group(NamedTuple):
    """B prompts with K responses each; a pytree.

    prompt [B, P] int32, prompt_lengths [B] int32 (at least 1);
    responses [B, K, R] int32, response_lengths [B, K] int32 (0: no such response).
    """

    prompt: Array
    prompt_lengths: Array
    responses: Array
    response_lengths: Array


def bucket(length: int) -> int:
    """The padded length for `length` tokens: 8, 16, 24, 32, then 1x and 1.5x powers of two (48, 64, 96, 128, ...).

    At most a third of a row past 32 tokens is padding, and lengths up to 2,048 need 16 shapes.
    """
    if length <= 32:
        return max(8, -(-length // 8) * 8)
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def pad_rows(
    rows: Sequence[Tokens], width: int, own: Sequence[bool] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as int32 [len(rows), width], right-padded with 0, and their lengths, int32 [len(rows)].

    With `own`, bool [len(rows)], the tokens of other rows stay 0; the lengths are there.
    """
    padded = np.zeros((len(rows), width), np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        lengths[i] = len(row)
        if own is None or own[i]:
            padded[i, : len(row)] = row
    return padded, lengths


def pack(
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Tokens]],
    *,
    prompt_width: int | None = None,
    response_width: int | None = None,
    own: np.ndarray | None = None,
) -> Group:
    """Packs lists of token ids into one Group of NumPy arrays.

    Args:
      prompts: B prompts, each at least one token.
      responses: B lists of K responses each; an empty response stands for none and scores 0.
      prompt_width, response_width: padded lengths; by default the bucket of the longest.
      own: bool [B], the groups that this process needs of a batch that several share; by default all. The tokens of
        others stay 0.
    Raises:
      ValueError: no prompts, an empty prompt, unequal numbers of responses, or a row longer than its width.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(
            f"pack needs as many prompts as response lists, and one at least: {len(prompts)}, {len(responses)}"
        )
    counts = {len(row) for row in responses}
    if len(counts) != 1:
        raise ValueError(f"every prompt needs the same number of responses, got {sorted(counts)}")
    if min(len(p) for p in prompts) == 0:
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty; it needs one token at least")
    flat = [response for row in responses for response in row]
    prompt_width = prompt_width or bucket(max(len(p) for p in prompts))
    response_width = response_width or bucket(max((len(r) for r in flat), default=1))
    shape = (len(prompts), counts.pop())
    prompt, prompt_lengths = pad_rows(prompts, prompt_width, own)
    tokens, lengths = pad_rows(flat, response_width, None if own is None else np.repeat(own, shape[1]))
    return Group(prompt, prompt_lengths, tokens.reshape(*shape, response_width), lengths.reshape(shape))


def response_mask(group: Group) -> jax.Array:
    """True on the real tokens of the responses, [B, K, R]."""
    width = group.responses.shape[-1]
    return jnp.arange(width)[None, None, :] < group.response_lengths[..., None]


def padding_share(group: Group, rows: int | None = None) -> float:
    """The share of a packed group's token positions that are padding; past the first `rows` rows all is."""
    real = int(np.sum(group.prompt_lengths[:rows])) + int(np.sum(group.response_lengths[:rows]))
    return 1.0 - real / (group.prompt.size + group.responses.size)


def epoch_order(count: int, *, seed: int, round_index: int, epoch: int) -> np.ndarray:
    """The permutation of `count` prompts for one epoch, int64 [count]; fixed by (seed, round, epoch)."""
    # SFT warm-up is round -1; SeedSequence takes non-negative words only.
    return np.random.default_rng([seed, round_index + 1, epoch]).permutation(count)


def batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cuts an epoch's order into batches of `size`; the last may be shorter (it is padded with masked rows later)."""
    for start in range(0, len(order), size):
        yield order[start : start + size]
