"""Tokenised examples on disk, so that the second run on the same data starts at once.

A file is named by a hash of everything its content follows from, appears by rename, and is never changed: any number
of runs may share the folder, and it may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from selfplay_jax import distributed
from selfplay_jax.data import tokens
from selfplay_jax.data.records import Example
from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.progress import say

_FORMAT = 2
_ROWS = 5000  # per row group: read and turned into lists together
_LISTS = ("prompt", "target", "rejected")
_TEXTS = ("prompt_text", "target_text", "question")


def encode(
    examples: Sequence[Example],
    template: Template,
    directory: str,
    *,
    on_progress: Callable[[int], None] = lambda count: None,
    **limits: Any,
) -> tuple[list[Record], dict[str, int]]:
    """`tokens.encode`, from the file in `directory` that holds its result, or written there; "" keeps nothing.

    A file that cannot be read is made anew, one that cannot be written is done without. Of several processes the lead
    writes, and those that do not see its file do afterwards.

    Raises:
      UserError: see `tokens.encode`.
    """
    if not directory or not examples:
        return tokens.encode(examples, template, on_progress=on_progress, **limits)
    path = Path(directory).expanduser() / f"{_key(examples, template, limits)}.parquet"
    kept = _read(path)
    found = kept or tokens.encode(examples, template, on_progress=on_progress, **limits)
    missing = distributed.gather(kept is None)
    if distributed.is_lead() and missing[0]:
        _write(path, *found)
    if any(missing[1:]):
        distributed.barrier("tokenised")
        if kept is None and not path.exists():  # the folder is this host's own
            _write(path, *found)
    if kept is not None:
        on_progress(len(examples))
    return found


def _key(examples: Sequence[Example], template: Template, limits: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    libraries = [version("tokenizers"), version("transformers")]
    made_by = [_FORMAT, libraries, template.tokenizer_sha256, template.sha256, sorted(limits.items())]
    digest.update(json.dumps(made_by).encode())
    for example in examples:
        content = [example.id, example.messages, example.response, example.rejected]
        digest.update(json.dumps(content, ensure_ascii=False).encode())
    return digest.hexdigest()


def _read(path: Path) -> tuple[list[Record], dict[str, int]] | None:
    """What a file holds; None where there is none, or none that can be trusted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            about = json.loads(file.schema_arrow.metadata[b"selfplay_jax"])
            numbers = np.arange(about["largest"] + 1).astype(object)  # one Python int per id, not one per token
            records: list[Record] = []
            for batch in file.iter_batches(_ROWS):
                records.extend(_records(batch, numbers))
        if len(records) != about["counts"]["kept"]:
            raise ValueError("rows are missing")
        return records, about["counts"]
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f"note: the tokenised data in {path} cannot be read ({type(error).__name__}) and are made anew")
        return None


def _records(batch: Any, numbers: np.ndarray) -> list[Record]:
    lists = {name: _lists(batch[name], numbers) for name in _LISTS}
    columns = [batch[name].to_pylist() for name in ("id", *_TEXTS)]
    return [
        Record(id, prompt, target, rejected, *texts)
        for id, *texts, prompt, target, rejected in zip(*columns, *lists.values(), strict=True)
    ]


def _lists(column: Any, numbers: np.ndarray) -> list[Any]:
    """An Arrow column of lists as Python lists, None where it is null; far faster than its `to_pylist`."""
    flat = numbers[column.values.to_numpy()].tolist()
    ends = column.offsets.to_numpy().tolist()
    return [
        flat[start:end] if valid else None
        for start, end, valid in zip(ends, ends[1:], column.is_valid().to_pylist(), strict=False)
    ]


def _write(path: Path, records: Sequence[Record], counts: dict[str, int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for record in records for row in (record.prompt, record.target, record.rejected or [0])]
    about = json.dumps({"counts": counts, "largest": max(map(max, rows))})
    names = {"id": pa.int64()} | dict.fromkeys(_LISTS, pa.list_(pa.int32()))
    names |= dict.fromkeys(_TEXTS, pa.string())
    schema = pa.schema(list(names.items()), metadata={"selfplay_jax": about})
    temporary = path.parent / f".{path.stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            for start in range(0, len(records), _ROWS):
                part = records[start : start + _ROWS]
                columns = {name: [getattr(record, name) for record in part] for name in names}
                writer.write_table(pa.table(columns, schema=schema))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        say(f"note: tokenised data cannot be kept in {path.parent} (data.cache): {error.strerror or error}")
