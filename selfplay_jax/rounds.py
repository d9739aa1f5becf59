"""A round's record on disk: responses, scores, summary. Every file appears by rename, so what is there is whole.

Of several processes the lead reads and writes for all, but for the parts of the responses: each writes its own.

WORKDIR/config.json
WORKDIR/sft/summary.json, metrics.jsonl          the SFT warm-up (round -1 here)
WORKDIR/rounds/000/responses.parquet             what θ_0 answered
WORKDIR/rounds/000/scores/player_000.npz         log π_θ0 of the targets and of the responses
WORKDIR/rounds/000/summary.json                  the done marker: written last
"""

import contextlib
import dataclasses
import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from selfplay_jax import distributed, metrics
from selfplay_jax.errors import UserError
from selfplay_jax.groups import REJECTED, TARGET

_PART = re.compile(r"part_(\d+)_(\d+)\.parquet")
_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("logp", pa.float32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Responses:
    """The responses of one round to N prompts, S each.

    tokens[n][s]: token ids, the end token included; finished [N, S] bool; logps [N, S] float32 as sampled (NaN for
    answers that were not sampled).
    """

    tokens: list[list[list[int]]]
    finished: np.ndarray
    logps: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Token counts, int32 [N, S]."""
        return np.array([[len(sample) for sample in samples] for samples in self.tokens], np.int32)

    @classmethod
    def join(cls, parts: Sequence["Responses"]) -> "Responses":
        """Concatenates along the prompts."""
        return cls(
            [samples for part in parts for samples in part.tokens],
            np.concatenate([part.finished for part in parts]),
            np.concatenate([part.logps for part in parts]),
        )


class RoundFiles:
    """The directory of one round (or of the SFT warm-up, round -1) and what lies in it."""

    def __init__(self, workdir: epath.PathLike, round_index: int):
        base = epath.Path(workdir)
        self.directory = base / "sft" if round_index < 0 else base / "rounds" / f"{round_index:03d}"
        self.round_index = round_index

    def summary(self) -> dict[str, Any] | None:
        """The finished round's summary, None while it is not finished."""
        return self.read("summary.json")

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file of this round, by rename."""

        def write() -> None:
            self.directory.mkdir(parents=True, exist_ok=True)
            metrics.write_json(self.directory / name, value)

        distributed.agree(write)

    def read(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file of this round, None where it is not there."""
        path = self.directory / name
        return distributed.agree(lambda: metrics.read_json(path) if path.exists() else None)

    # Responses: parts while they are sampled, one file at the end.

    def responses_path(self, part: slice | None = None) -> epath.Path:
        """Where the responses lie, or those to a part of the prompts while sampling is under way."""
        if part is None:
            return self.directory / "responses.parquet"
        return self.directory / "responses" / f"part_{part.start:08d}_{part.stop:08d}.parquet"

    def parts(self) -> list[slice]:
        """The parts that lie there, in order."""
        folder = self.directory / "responses"
        found = [_PART.fullmatch(path.name) for path in folder.iterdir()] if folder.exists() else []
        return sorted((slice(int(m[1]), int(m[2])) for m in found if m), key=lambda part: part.start)

    def save_responses(
        self, responses: Responses, records: Sequence[Any], texts: Sequence[str], part: slice | None = None
    ) -> None:
        """Writes responses to `records` (which name id and prompt_text); `texts` are the responses for people."""
        count = responses.finished.shape[1]
        rows = {
            "id": [record.id for record in records for _ in range(count)],
            "sample": list(range(count)) * len(records),
            "prompt": [record.prompt_text for record in records for _ in range(count)],
            "response": list(texts),
            "tokens": [sample for samples in responses.tokens for sample in samples],
            "finished": responses.finished.ravel(),
            "logp": responses.logps.ravel(),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(rows, schema=_SCHEMA), buffer)
        write_bytes(self.responses_path(part), buffer.getvalue())

    def load_responses(self, ids: Sequence[int], part: slice | None = None) -> Responses:
        """Reads responses back.

        Raises:
          UserError: the file answers other prompts than `ids` (the data changed under the run).
        """
        wait_for(self.responses_path(part))
        return _read_responses(self.responses_path(part), ids)

    def join_parts(self, parts: Sequence[slice]) -> None:
        """Makes responses.parquet of `parts`, which follow on each other, then drops them."""

        def join() -> None:
            tables = []
            for part in parts:
                wait_for(self.responses_path(part))
                tables.append(pq.read_table(io.BytesIO(self.responses_path(part).read_bytes())))
            buffer = io.BytesIO()
            pq.write_table(pa.concat_tables(tables), buffer)
            write_bytes(self.responses_path(), buffer.getvalue())
            (self.directory / "responses").rmtree()

        distributed.agree(join)

    def score_path(self, player: int) -> epath.Path:
        """The score table's cells of one player that belong to this round, see scoring.py."""
        return self.directory / "scores" / f"player_{player:03d}.npz"


def source_name(source: int) -> str:
    """A source's name in files: "target", "rejected", or "round_003"."""
    return {TARGET: "target", REJECTED: "rejected"}.get(source) or f"round_{source:03d}"


def _read_responses(path: epath.Path, ids: Sequence[int]) -> Responses:
    table = pq.read_table(io.BytesIO(path.read_bytes()))
    found = table["id"].to_numpy()
    if len(ids) == 0 or len(found) % len(ids) or not np.array_equal(found, np.repeat(ids, len(found) // len(ids))):
        raise UserError(
            f"{path} answers other prompts than the data has now: the data changed under the run; "
            "use a new --workdir, or bring the data back."
        )
    shape = (len(ids), len(found) // len(ids))
    flat = table["tokens"].to_pylist()
    return Responses(
        [flat[n * shape[1] : (n + 1) * shape[1]] for n in range(shape[0])],
        table["finished"].to_numpy(zero_copy_only=False).reshape(shape),
        table["logp"].to_numpy().reshape(shape),
    )


def wait_for(path: epath.Path, seconds: float = 60.0) -> None:
    """Waits for a file that another process has written: shared file systems may show it late.

    Raises:
      UserError: it does not come.
    """
    deadline = time.monotonic() + (seconds if distributed.count() > 1 else 0.0)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if distributed.count() > 1 and not path.exists():
        raise UserError(
            f"process {distributed.index()} does not see {path}, which another process wrote: the workdir must be on a "
            "file system that all hosts share (NFS, a mounted bucket, gs://)."
        )


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all: to a temporary sibling first, then by rename (object stores need neither).

    Raises:
      UserError: the disk is full or not writable.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "://" in str(path):
            path.write_bytes(data)
            return
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; what was written before it is whole."
        ) from error


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """Writes a .npy file by rename."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


def read_array(path: epath.Path) -> np.ndarray:
    """Reads a .npy file."""
    return np.load(io.BytesIO(path.read_bytes()))


def gaps(count: int, parts: Sequence[slice]) -> list[slice]:
    """What of `count` rows is in none of `parts`, which are in order."""
    starts, stops = [0, *(part.stop for part in parts)], [*(part.start for part in parts), count]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def chunks(count: int, size: int) -> Iterator[tuple[int, slice]]:
    """Cuts `count` rows into numbered slices of `size`."""
    for part, start in enumerate(range(0, count, size)):
        yield part, slice(start, min(start + size, count))
