"""Log-likelihoods of continuations of contexts, each context's layers run once for all its continuations.

What multiple-choice benchmarks ask: many short continuations of few long contexts, and several questions twice.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.groups import pack
from selfplay_jax.logprobs import by_rows, greedy_logps
from selfplay_jax.models.decoder import Model, Params

# Continuations that stand beside each other in a group, at most: by number, and by tokens (padding included).
_MOST_COLUMNS, _MOST_TOKENS = 32, 2048
# Up to so many batches, each may have a program of its own.
_FEW = 8
# Rows up to this length go `batch_size` together.
_FULL_BATCH_TOKENS = 1024 + 128
# Tokens of continuations that weigh little beside a context.
_LITTLE = 64

Ids = tuple[int, ...]


class Likelihoods(NamedTuple):
    """logps [N] float32: log π(continuation | context) in nats; greedy [N] bool: whether greedy decoding writes it."""

    logps: np.ndarray
    greedy: np.ndarray


class _Row(NamedTuple):
    """One context with some of its continuations: a row of a batch."""

    context: Ids
    continuations: list[Ids]


@functools.lru_cache(maxsize=8)
def _program(model: Model, mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return by_rows(model, mesh, greedy_logps)


def likelihoods(
    model: Model,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    mesh: Mesh,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Likelihoods:
    """log π(continuation | context) of N pairs of token ids, in the order of the pairs.

    Pairs with one context share its forward pass; a pair that comes twice is computed once. Sizes are padded to few
    shapes, which compile once for all calls with the same model and mesh.

    Args:
      pairs: (context, continuation), each one token at least.
      mesh: where the parameters live.
      batch_size: contexts per forward pass; fewer where they are longer than 1,024 tokens, for attention's memory.
      on_progress: called with the number of pairs done since the last call.
    Raises:
      ValueError: an empty context or continuation.
    """
    if any(not len(context) or not len(continuation) for context, continuation in pairs):
        raise ValueError("every pair needs a context and a continuation of one token at least")
    asked: dict[tuple[Ids, Ids], list[int]] = collections.defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        asked[tuple(context), tuple(continuation)].append(i)
    result = Likelihoods(np.zeros(len(pairs), np.float32), np.zeros(len(pairs), bool))
    program = _program(model, mesh)
    rows = _rows(asked)
    plan = _Plan(batch_size, partitioning.data_shards(mesh), few=len(rows) <= _FEW * batch_size)
    for batch in plan.batches(rows):
        count, prompt_width, columns, width = plan.sizes(batch)
        padded = [batch[i % len(batch)] for i in range(count)]
        group = pack(
            [row.context for row in padded],
            [row.continuations + [()] * (columns - len(row.continuations)) for row in padded],
            prompt_width=prompt_width,
            response_width=width,
        )
        with partitioning.use_mesh(mesh):
            logps, greedy = jax.device_get(program(params, group))
        done = 0
        for b, row in enumerate(batch):
            for k, continuation in enumerate(row.continuations):
                where = asked[row.context, continuation]
                result.logps[where], result.greedy[where] = logps[b, k], greedy[b, k]
                done += len(where)
        if on_progress is not None:
            on_progress(done)
    return result


def _rows(asked: Iterable[tuple[Ids, Ids]]) -> list[_Row]:
    """The contexts with their continuations, the shortest first, cut where too many would stand side by side."""
    by_context: dict[Ids, list[Ids]] = collections.defaultdict(list)
    for context, continuation in asked:
        by_context[context].append(continuation)
    rows = []
    for context, continuations in by_context.items():
        row: list[Ids] = []
        for continuation in sorted(continuations, key=len):
            tokens = (len(row) + 1) * len(continuation)
            if len(row) == _MOST_COLUMNS or (row and tokens > _MOST_TOKENS):
                rows.append(_Row(context, row))
                row = []
            row.append(continuation)
        rows.append(_Row(context, row))
    return rows


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How rows are batched and padded.

    shards: what the number of rows of a batch must be a multiple of. few: there are few batches, so that exact sizes
    do not make many programs.
    """

    batch_size: int
    shards: int
    few: bool

    def width(self, length: int) -> int:
        """The padded length: 1, 8, 16, ..., 64, then four to an octave (80, 96, 112, 128, 160, ...); finer if few."""
        if length == 1:
            return 1
        step = 8 if self.few else max(8, (1 << (length - 1).bit_length()) // 8)
        return -(-length // step) * step

    def shape(self, rows: Sequence[_Row]) -> tuple[int, int]:
        """The padded number and length of the continuations of rows that go together."""
        longest = max(len(continuation) for row in rows for continuation in row.continuations)
        return _columns(max(len(row.continuations) for row in rows)), self.width(longest)

    def capacity(self, rows: Sequence[_Row]) -> int:
        """How many rows like these go together: attention's memory grows with the square of their length."""
        tokens = max(len(row.context) for row in rows) + self.shape(rows)[1]
        return max(1, int(self.batch_size * min(1.0, (_FULL_BATCH_TOKENS / tokens) ** 2)))

    def batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Batches of rows whose sizes are much alike, so that little is padded and most are full.

        Rows are sorted by the number of continuations, their length (roughly where they are short), and the context's
        length, up and down in turns, so that neighbours are alike at the seams too. A row goes with those before it
        unless that pads its continuations to more than twice their size.
        """
        by_shape: dict[tuple[int, int], list[_Row]] = collections.defaultdict(list)
        for row in rows:
            columns, width = self.shape([row])
            by_shape[columns, width if width > 64 else 1 << (width - 1).bit_length()].append(row)
        batch: list[_Row] = []
        for turn, shape in enumerate(sorted(by_shape, reverse=True)):
            for row in sorted(by_shape[shape], key=lambda row: len(row.context), reverse=turn % 2 == 0):
                size, alone = math.prod(self.shape([*batch[:1], row])), math.prod(self.shape([row]))
                full = len(batch) >= self.capacity([*batch[:1], *batch[-1:], row])
                if batch and (full or size > max(_LITTLE, 2 * alone)):
                    yield batch
                    batch = []
                batch.append(row)
        if batch:
            yield batch

    def sizes(self, batch: Sequence[_Row]) -> tuple[int, int, int, int]:
        """The padded sizes of a batch: rows (in quarters of a full batch), context, continuations, their length."""
        quarter = -(-self.capacity(batch) // (4 * self.shards)) * self.shards
        return (
            -(-len(batch) // quarter) * quarter,
            self.width(max(len(row.context) for row in batch)),
            *self.shape(batch),
        )


def _columns(count: int) -> int:
    """The padded number of continuations: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power
