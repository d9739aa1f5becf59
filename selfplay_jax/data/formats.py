"""Opening sources: JSONL, JSON and Parquet files, directories and globs of them. `libraries` opens the others."""

import contextlib
import dataclasses
import difflib
import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from selfplay_jax import stores
from selfplay_jax.data.records import Malformed
from selfplay_jax.errors import UserError

Row = tuple[str, dict[str, Any] | Malformed]  # position, and the record or what is wrong with it

_SUFFIXES = (".jsonl", ".json", ".parquet")
_NO_DATA = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside the data
_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")  # how the hub and `datasets` name their files


@dataclasses.dataclass(frozen=True)
class Table:
    """One file or dataset. path: its name for people; rows: in order, read as they are asked for."""

    path: str
    columns: list[str]
    rows: Iterable[Row]


def open_files(source: str, path: Path, split: str) -> list[Table]:
    """The tables of a file, of a glob's files, or of a directory's files that belong to `split`.

    Raises:
      UserError: no such file or split, or a file that cannot be read.
    """
    tables = []
    for file in _files(source, path, split):
        try:
            tables.append(_parquet(file) if file.suffix == ".parquet" else _json(file))
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    return tables


def local_path(source: str) -> Path | None:
    """The path that a source names, existing or not; None for what must be a hub name. Of what lies on gs:// or s3://
    it is the path of a copy.

    A downloaded hub repository's "directory:config" is the directory of that config.

    Raises:
      UserError: nothing is at a path on an object store, or it cannot be read.
    """
    if stores.is_remote(source):
        folder, _, config = source.rpartition(":")
        if stores.is_remote(folder) and "/" not in config:
            return stores.local_copy(folder, lambda name: name.startswith(f"{config}/") and _is_data(name)) / config
        return stores.local_copy(source, _is_data)
    path = Path(source).expanduser()
    name, colon, config = str(path).rpartition(":")
    if colon and not path.exists() and (Path(name) / config).is_dir():
        return Path(name) / config
    if path.exists() or path.suffix in _SUFFIXES or source.startswith((".", "/", "~")):
        return path
    return path if source.count("/") > 1 or any(c in source for c in "*?[\\") else None


def _is_data(name: str) -> bool:
    return name.endswith((*_SUFFIXES, ".arrow"))  # .arrow: what `save_to_disk` writes beside .json


def no_split(source: str, split: str, there: Iterable[str]) -> UserError:
    """The error for a split that does not exist."""
    return UserError(f"{source} has no split {split!r}; its splits are {', '.join(there)}: set data.split")


def first_line(error: BaseException) -> str:
    """What an error of a library says, as part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _files(source: str, path: Path, split: str) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.name not in _NO_DATA and p.is_file())
        if not found:
            raise UserError(f"{source} holds no {', '.join(_SUFFIXES)} file")
        return _of_split(source, path, found, split)
    if path.exists():
        found = [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise UserError(f"{source} does not exist{_near(path)}")
    for file in found:
        if file.suffix not in _SUFFIXES:
            raise UserError(f"{file}: cannot read a {file.suffix or 'suffixless'} file; use {', '.join(_SUFFIXES)}")
    return found


def _of_split(source: str, root: Path, files: list[Path], split: str) -> list[Path]:
    shards = {file: match.group(1) for file in files if (match := _SHARD.fullmatch(file.stem))}
    if shards:  # laid out like a hub repository: file names say exactly which split they are of
        chosen = [file for file, name in shards.items() if name == split]
        if not chosen:
            raise no_split(source, split, sorted(set(shards.values())))
        folders = sorted({str(file.parent.relative_to(root)) for file in chosen})
        if len(folders) > 1:
            raise UserError(f"{source} has several configs, {', '.join(folders)}; name one: {source}:{folders[0]}")
        return chosen

    def words(file: Path) -> list[str]:
        return re.split(r"[^a-z0-9]+", file.stem.lower())

    wanted = re.split(r"[^a-z0-9]+", split.lower())
    chosen = [file for file in files if _holds(words(file), wanted)]
    if not chosen:  # the hub's own conversions: main/train/0000.parquet
        chosen = [file for file in files if file.parent != root and file.parent.name == split]
    if not chosen and any(word in words(file) for file in files for word in _SPLITS):
        listed = ", ".join(file.name for file in files[:10])
        raise UserError(f"{source} has no file for the split {split!r} among {listed}; set data.split or name a file")
    return chosen or files


def _holds(words: list[str], wanted: list[str]) -> bool:
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the directory {path.parent} does not exist"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f" (looked in {path.parent.resolve()})"


def _json(file: Path) -> Table:
    """JSON Lines, or one JSON array of records.

    Parsed by the json module rather than by `datasets`: Arrow refuses or converts a column that mixes types,
    and cannot say on which line.
    """
    with file.open("rb") as stream:
        first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        try:
            records = json.loads(file.read_text("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not valid UTF-8 ({error.reason} at byte {error.start + 1}); mend it") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file}: not a valid JSON array: {error}; mend it, or use one JSON object per line"
            ) from None
        rows = [(f"[{i}]", _object(record)) for i, record in enumerate(records)]
    else:
        rows = list(_lines(file))
    seen: dict[str, None] = {}
    for _, row in rows:
        if isinstance(row, dict):
            seen.update(dict.fromkeys(row))
    return Table(str(file), list(seen), rows)


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:  # by bytes: str.splitlines would also split at U+2028 inside a string
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            position = f":{number}"
            try:
                text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
                yield position, _object(json.loads(text))
            except json.JSONDecodeError as error:
                yield position, Malformed(f"not valid JSON ({error.msg} at column {error.colno})")
            except UnicodeDecodeError as error:
                yield position, Malformed(f"not valid UTF-8 ({error.reason} at byte {error.start + 1})")
            except RecursionError:
                yield position, Malformed("not valid JSON (nested too deeply)")


def _object(record: Any) -> dict[str, Any] | Malformed:
    if isinstance(record, dict):
        return record
    return Malformed(f"a record must be a JSON object, not {type(record).__name__}")


def _parquet(file: Path) -> Table:
    import pyarrow.parquet as pq

    with _readable(file):
        opened = pq.ParquetFile(file)
    return Table(str(file), opened.schema_arrow.names, _parquet_rows(file, opened))


def _parquet_rows(file: Path, opened: Any) -> Iterator[Row]:
    with _readable(file):
        yield from arrow_rows(opened.iter_batches(1000))


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns whatever Arrow says about a broken file into a sentence."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {first_line(error)}") from error


def arrow_rows(batches: Iterable[Any]) -> Iterator[Row]:
    """The rows of Arrow tables or batches, one after the other."""
    start = 0
    for batch in batches:
        try:
            rows: list[dict[str, Any] | Malformed] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one(batch, i) for i in range(batch.num_rows)]
        for offset, row in enumerate(rows):
            yield f"[{start + offset}]", row
        start += batch.num_rows


def _one(batch: Any, index: int) -> dict[str, Any] | Malformed:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Malformed(f"not valid UTF-8 ({error.reason} at byte {error.start + 1} of a text)")
