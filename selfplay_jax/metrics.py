"""A phase's metrics on disk: JSON lines for programs, TensorBoard events for people, whole after any kill.

`metrics.jsonl` is the truth and the event file is derived from it. All JSON written here is strict: a number
that is not finite becomes the string "NaN", "Infinity" or "-Infinity" (JSON has no such numbers), and `read`
and `read_json` turn these three strings back into floats.
"""

import contextlib
import errno
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from etils import epath

from selfplay_jax import distributed
from selfplay_jax.errors import UserError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FLUSH_SECONDS = 5.0  # how far TensorBoard may lag behind
_REMOTE_SECONDS = 15.0  # how far an object store may: it cannot append, the file is written whole each time
_NOT_SCALARS = ("kind", "round", "step", "time")  # coordinates of a row, not curves


class MetricsWriter:
    """Appends rows to `dir/metrics.jsonl` and mirrors their numbers as scalars under `dir/tensorboard`.

    Opening an existing directory first repairs it: a torn last line goes, and with `resume_step` so do the
    rows of kind "train" with a larger step, which the resumed run computes again. The event file is then
    written anew from the rows that were kept, so TensorBoard shows every step once however often the run was
    killed. Of several processes the lead writes.

    On an object store (gs://, s3://), which cannot append, both files are written whole every 15 seconds, by `flush`
    and at the end; a kill loses the rows since.

    Args:
      dir: a directory, made when missing.
      resume_step: the last step whose training is kept (0: none where steps count from 1); None keeps all.

    Raises:
      UserError: a line inside the file is no JSON, or the disk is full.
    """

    def __init__(self, dir: epath.PathLike, *, resume_step: int | None = None):
        self._dir = epath.Path(dir)
        self._path = self._dir / "metrics.jsonl"
        self._files: _LocalFiles | _RemoteFiles | None = None
        if distributed.is_lead():
            self._dir.mkdir(parents=True, exist_ok=True)
            rows = self._repair(resume_step)
            self._files = _RemoteFiles(self._dir, rows) if "://" in str(dir) else _LocalFiles(self._dir, rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row: `kind`, `round` and `step` say where it belongs, "time" (Unix seconds) is added if
        missing.

        Numbers (Python's, NumPy's or JAX's) become the scalars `kind/name` in TensorBoard, other values only
        JSON.
        """
        if self._files is None:
            return
        plain: dict[str, Any] = {str(key): _plain(value) for key, value in row.items()}
        plain.setdefault("time", round(time.time(), 3))
        with _told(self._path):
            self._files.add(plain)

    def flush(self) -> None:
        """Brings the event file up to date; the JSON lines always are, but for an object store's."""
        if self._files is not None:
            self._files.flush()

    def close(self) -> None:
        """Ends both files; a second call does nothing."""
        if self._files is not None:
            files, self._files = self._files, None
            files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _repair(self, resume_step: int | None) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        rows = read(self._path)
        kept = [row for row in rows if not _is_after(row, resume_step)]
        text = "".join(_dump(row) + "\n" for row in kept)
        if text.encode() != self._path.read_bytes():
            write_text(self._path, text)
        return kept


class _LocalFiles:
    """metrics.jsonl, appended to, and the event file."""

    def __init__(self, folder: epath.Path, rows: list[dict[str, Any]]):
        self._fd = os.open(folder / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._events = _EventFile(folder / "tensorboard")
        for row in rows:
            self._events.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        _write_all(self._fd, (_dump(row) + "\n").encode())
        self._events.add(row)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        os.close(self._fd)
        self._events.close()


class _RemoteFiles:
    """The same pair in a local folder, copied to the object store now and then."""

    def __init__(self, folder: epath.Path, rows: list[dict[str, Any]]):
        self._folder = folder
        self._here = tempfile.TemporaryDirectory(prefix="selfplay_jax_metrics_")
        local = epath.Path(self._here.name)
        (local / "metrics.jsonl").write_text("".join(_dump(row) + "\n" for row in rows))
        self._files = _LocalFiles(local, rows)
        events = folder / "tensorboard"
        for old in events.glob("events.out.tfevents.*") if events.exists() else ():
            old.unlink()  # of the run before it was interrupted: its rows are in the new one
        self._copied = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        self._files.add(row)
        if time.monotonic() - self._copied > _REMOTE_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._files.flush()
        self._copy()

    def close(self) -> None:
        self._files.close()
        self._copy()
        self._here.cleanup()

    def _copy(self) -> None:
        local = epath.Path(self._here.name)
        for file in (local / "metrics.jsonl", *(local / "tensorboard").iterdir()):
            there = self._folder / file.relative_to(local)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
        self._copied = time.monotonic()


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without what a kill or power cut tore at its end; a missing file has no
    rows.

    Raises:
      UserError: a line that is no JSON object has good ones after it; names file and line.
    """
    file = epath.Path(path)
    rows: list[dict[str, Any]] = []
    torn = 0
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            torn = torn or number
        elif torn:
            raise UserError(f"{file}, line {torn}: not a JSON object; delete that line or restore the file")
        else:
            rows.append(_revive(row))
    return rows


def write_json(path: epath.PathLike, obj: Any) -> None:
    """Writes `obj` as strict, indented JSON; the file is there whole or not at all, also after a power cut.

    Raises:
      UserError: the disk is full; the file's old content is kept.
    """
    write_text(path, json.dumps(_strict(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Reads a JSON object written by `write_json`.

    Raises:
      UserError: the file is missing or is not a JSON object.
    """
    file = epath.Path(path)
    try:
        obj = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); restore it or delete it") from None
    if not isinstance(obj, dict):
        raise UserError(f"{file} holds {type(obj).__name__}, not a JSON object; restore it or delete it")
    return _revive(obj)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a UTF-8 file by fsync and rename (on an object store, where a write is atomic, directly)."""
    file = epath.Path(path)
    if "://" in str(path):
        file.write_text(text)
        return
    partial = f"{file}.partial-{os.getpid()}"
    with _told(file):
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_all(fd, text.encode())
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


class _EventFile:
    """One TensorBoard event file in place of those already in its directory, an event per row.

    tensorboardX's SummaryWriter would send every scalar through a queue to a thread: slow, and its flush
    returns before the queue is empty. Its writer of event files is used directly.
    """

    def __init__(self, folder: epath.Path):
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            # emptied first, removed the next time: a TensorBoard that is reading it would never get past a
            # missing file
            if old.stat().length:
                os.truncate(old, 0)
            else:
                old.unlink()
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # the suffix keeps a new file from taking the name of one made in the same second
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns():x}")
        # a session's start at step 0 tells a TensorBoard that shows this run to forget what the old file said
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(wall_time=time.time(), step=0, session_log=start))
        self._flushed = time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        values = []
        for name, value in row.items():
            number = _NON_FINITE.get(value, value) if isinstance(value, str) else value
            if name in _NOT_SCALARS or isinstance(number, bool) or not isinstance(number, int | float):
                continue
            values.append(self._summary.Value(tag=f"{row.get('kind', 'train')}/{name}", simple_value=number))
        where = {"wall_time": row.get("time", 0.0), "step": int(row.get("step", 0))}
        self._writer.write_event(self._event(summary=self._summary(value=values), **where))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _is_after(row: Mapping[str, Any], resume_step: int | None) -> bool:
    return resume_step is not None and row.get("kind") == "train" and row.get("step", 0) > resume_step


def _plain(value: Any) -> Any:
    """NumPy and JAX values as Python numbers and lists."""
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    return str(value)


def _strict(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value


def _revive(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    return [_revive(item) for item in value] if isinstance(value, list) else value


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(_strict(row), ensure_ascii=False, allow_nan=False)


def _write_all(fd: int, data: bytes) -> None:
    while data:  # a line is one write; the loop is for the short write of a disk that just filled up
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _told(path: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise UserError(f"disk full while writing {path}: free some space and run the same command again") from error
