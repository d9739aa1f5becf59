"""The table a round trains on, and its batches in a fixed order, packed ahead of the device by Grain."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from selfplay_jax import groups
from selfplay_jax.groups import Array, Group, Tokens, epoch_order, pack

_AHEAD = 2  # batches packed while the device works


class Batch(NamedTuple):
    """B groups with what the frozen players said of them; every leaf has B first.

    players [B, J, K] float32; present [B, K] bool: responses to train on; real [B] bool: not a filler row.
    """

    group: Group
    players: Array
    present: Array
    real: Array


@dataclasses.dataclass(frozen=True)
class Table:
    """All that a round trains on: one row per prompt, one column per source.

    prompts, targets: N lists of ids. opponents: by opposing source (newest round first) the S responses to each prompt;
    usable: the same as bool [N, S]. players: by source ([target, *opponents]) float32 [J, N, S_source].
    """

    prompts: Sequence[Tokens]
    targets: Sequence[Tokens]
    opponents: Sequence[Sequence[Sequence[Tokens]]]
    usable: Sequence[np.ndarray]
    players: Sequence[np.ndarray]

    def batch(self, rows: np.ndarray, *, size: int, epoch: int, per_round: int, own: np.ndarray | None = None) -> Batch:
        """The groups of `rows`, filled up to `size`; of a source's S samples each epoch takes the next `per_round`.

        `own`, bool [size]: the groups whose tokens this process needs, by default all.
        """
        filled = np.resize(rows, size)
        real = np.arange(size) < len(rows)
        columns = [[[self.targets[n]] for n in filled]]
        present = [np.ones((size, 1), bool)]
        players = [self.players[0][:, filled]]
        for responses, usable, scores in zip(self.opponents, self.usable, self.players[1:], strict=True):
            taken = (epoch * per_round + np.arange(min(per_round, usable.shape[1]))) % usable.shape[1]
            columns.append([[responses[n][s] for s in taken] for n in filled])
            present.append(usable[np.ix_(filled, taken)])
            players.append(scores[:, filled][:, :, taken])
        responses = [[z for column in columns for z in column[b]] for b in range(size)]
        scores = np.moveaxis(np.concatenate(players, axis=-1), 0, 1).astype(np.float32)
        group = pack([self.prompts[n] for n in filled], responses, own=own)
        return Batch(group, scores, np.concatenate(present, axis=-1) & real[:, None], real)


def schedule(count: int, size: int, epochs: int, *, seed: int, round_index: int) -> list[tuple[int, np.ndarray]]:
    """Every step of a round as (epoch, rows of the table); fixed by (seed, round, epoch)."""
    return [
        (epoch, rows)
        for epoch in range(epochs)
        for rows in groups.batches(epoch_order(count, seed=seed, round_index=round_index, epoch=epoch), size)
    ]


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Random access to the packed batches of a schedule, as Grain's sources are."""

    table: Table
    steps: list[tuple[int, np.ndarray]]
    size: int
    per_round: int
    own: np.ndarray | None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch:
        epoch, rows = self.steps[step]
        return self.table.batch(rows, size=self.size, epoch=epoch, per_round=self.per_round, own=self.own)


def batches(
    table: Table,
    steps: list[tuple[int, np.ndarray]],
    *,
    size: int,
    per_round: int,
    own: np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """The batches of a schedule, in order. `get_state()` says where the iterator stands, `set_state` goes there.

    Every process has the whole batch's shapes and lengths, and the tokens of the rows `own` (bool [size]) or of all.
    """
    source = grain.MapDataset.source(_Batches(table, steps, size, per_round, own))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)))
