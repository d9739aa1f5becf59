"""The score table: log π_j(z|x) of frozen player j on the responses of one source, computed once ever.

A cell (player, source) never changes: source TARGET is the annotated answers, REJECTED the dispreferred ones, source s
the responses of round s. It can first be needed in round max(player, source), and lies in that round's directory. Later
rounds read it.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.groups import Tokens, pack
from selfplay_jax.logprobs import by_rows, response_logps
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.rounds import RoundFiles, chunks, read_array, source_name, write_array, write_bytes

# Responses scored beside each other in one group; more columns than this are scored in turns.
_MOST_COLUMNS = 8


@functools.lru_cache(maxsize=8)
def _score_program(model: Model, mesh: Mesh) -> Callable[..., jax.Array]:
    return by_rows(model, mesh, response_logps)


def score(
    model: Model,
    params: Params,
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Tokens]],
    *,
    mesh: Mesh,
    batch_size: int,
) -> np.ndarray:
    """log π(response | prompt) of K responses to each of N prompts under one parameter tree, float32 [N, K].

    Prompts are taken in the order of their lengths, so that batches are padded little; batches are always full (the
    last is filled with copies), so that there are few shapes.
    """
    count, width = len(prompts), len(responses[0])
    result = np.zeros((count, width), np.float32)
    shards = partitioning.data_shards(mesh)
    batch_size = -(-min(batch_size, count) // shards) * shards
    by_length = np.argsort([len(p) + max(map(len, r)) for p, r in zip(prompts, responses, strict=True)], kind="stable")
    program = _score_program(model, mesh)
    for start in range(0, count, batch_size):
        rows = by_length[start : start + batch_size]
        padded = np.resize(rows, batch_size).tolist()
        for left in range(0, width, _MOST_COLUMNS):
            right = min(left + _MOST_COLUMNS, width)
            group = pack([prompts[i] for i in padded], [responses[i][left:right] for i in padded])
            with partitioning.use_mesh(mesh):
                result[rows, left:right] = np.asarray(program(params, group))[: len(rows)]
    return result


class ScoreTable:
    """The cells of one run. What one pass computed lies in one file, so that it is there together or not at all."""

    def __init__(self, workdir: epath.PathLike):
        self._workdir = workdir

    def _path(self, player: int, source: int) -> epath.Path:
        return RoundFiles(self._workdir, max(player, source)).score_path(player)

    def has(self, player: int, source: int) -> bool:
        """Whether a cell is there."""
        path = self._path(player, source)
        return path.exists() and source_name(source) in np.load(io.BytesIO(path.read_bytes()))

    def missing(self, players: Sequence[int], sources: Sequence[int]) -> dict[int, list[int]]:
        """By player, the sources whose cells must still be computed; players with nothing to do are left out."""
        wanted = {player: [s for s in sources if not self.has(player, s)] for player in players}
        return {player: sources for player, sources in wanted.items() if sources}

    def read(self, player: int, source: int) -> np.ndarray:
        """The cell [N, S], float32."""
        return np.load(io.BytesIO(self._path(player, source).read_bytes()))[source_name(source)]

    def fill(
        self,
        player: int,
        responses: dict[int, Sequence[Sequence[Tokens]]],
        prompts: Sequence[Tokens],
        *,
        model: Model,
        params: Params,
        mesh: Mesh,
        batch_size: int,
        chunk: int,
        check_stop: Callable[[], None] = lambda: None,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Computes the cells (player, source) for every source in `responses`, all in one pass over the prompts.

        `responses[source][n]` are the S responses to prompt n. Work is saved every `chunk` prompts; a killed pass goes
        on from there. `check_stop` is called before each chunk and may raise.
        """
        sources = sorted(responses)
        path = self._path(player, max(sources))
        parts = path.parent / f"{path.stem}.parts"
        columns = [[z for source in sources for z in responses[source][n]] for n in range(len(prompts))]
        pieces = []
        for part, rows in chunks(len(prompts), chunk):
            file = parts / f"part_{part:05d}.npy"
            if not file.exists():
                check_stop()
                values = score(model, params, prompts[rows], columns[rows], mesh=mesh, batch_size=batch_size)
                write_array(file, values)
            pieces.append(read_array(file))
            on_progress(rows.stop - rows.start)
        widths = np.cumsum([len(responses[source][0]) for source in sources])[:-1]
        cells = np.split(np.concatenate(pieces), widths, axis=1)
        buffer = io.BytesIO()
        named: dict[str, Any] = {source_name(s): cell for s, cell in zip(sources, cells, strict=True)}
        np.savez(buffer, **named)
        write_bytes(path, buffer.getvalue())
        parts.rmtree()
