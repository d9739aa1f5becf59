"""Where examples come from: JSONL, JSON and Parquet files, or a dataset on the Hugging Face hub.

Every source ends in the same `Example`, numbered by its place in the full source, so that a prompt keeps its
id whatever subset of the source a run uses and however many records were skipped.
"""

import dataclasses
import difflib
import glob
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfplay_jax.errors import UserError

Message = dict[str, str]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROLES = ("system", "user", "assistant", "tool")
_FIELDS = ("prompt", "response", "rejected", "messages")
# In this order: preference data often carries `messages` as well, and the more telling columns win.
_CONVENTIONS = (
    {"prompt": "prompt", "response": "chosen", "rejected": "rejected"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "question", "response": "answer"},
    {"messages": "messages"},
)
_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its annotated answer.

    id: index of the record in the full source, from 0; skipped and bad records keep their numbers.
    messages: {"role", "content"} dicts, everything before the final answer; never empty.
    response: the annotated (or chosen) answer, as it stands in the source.
    rejected: the dispreferred answer of preference data, else None.
    where: "file.jsonl:17" (line, from 1) or "file.parquet[16]" (row, from 0), for messages to people.
    """

    id: int
    messages: tuple[Message, ...]
    response: str
    rejected: str | None = None
    where: str = ""


class _BadRecord(Exception):
    """What is wrong with one record, to follow "file:line: "."""


@dataclasses.dataclass(frozen=True)
class _Table:
    """One file; rows are (position, record), or (position, what is wrong with it)."""

    path: str
    columns: list[str]
    rows: Iterable[tuple[str, dict[str, Any] | _BadRecord]]


def load(
    path_or_name: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int = 0,
    seed: int = 0,
    on_bad_record: str = "raise",
) -> tuple[list[Example], int]:
    """Reads a source and returns its examples in order, and how many records were skipped.

    Args:
      path_or_name: a .jsonl, .json or .parquet file, a directory or glob of them, or a hub dataset,
        "owner/name" or "owner/name:config". In a directory the files that name `split` are read, or all if
        none names a split.
      split: the hub dataset's split, or see above; of no effect for a single file or a glob.
      columns: {"prompt": column, "response": column[, "rejected": column]} or {"messages": column}. Default:
        found out from the names prompt/chosen/rejected, prompt/response, prompt/completion, question/answer,
        messages. A prompt is a string or a list of messages; an answer is a string, or the last turn (an
        assistant's) of a list of messages.
      limit: at most this many examples, drawn by `seed` (a larger limit adds to a smaller's draw); 0: all.
      on_bad_record: "raise", or "skip" to count malformed lines, and empty, missing or non-text fields.

    Raises:
      UserError: for every failure, naming the file and line, or what was tried on the hub.
    """
    if on_bad_record not in ("raise", "skip"):
        raise UserError(f"data.on_bad_record is {on_bad_record!r}; it must be 'raise' or 'skip'")
    if limit < 0:
        raise UserError(f"data.limit is {limit}; it must be 0 (all examples) or more")
    tables = list(_open(str(path_or_name), split))
    mapping = _mapping(path_or_name, tables, dict(columns or {}))
    examples, skipped, index = [], 0, 0
    for table in tables:
        for position, row in table.rows:
            try:
                if isinstance(row, _BadRecord):
                    raise row
                where = Path(table.path).name + position
                examples.append(_example(index, row, mapping, where))
            except _BadRecord as bad:
                if on_bad_record == "raise":
                    advice = "mend the record, or set data.on_bad_record to 'skip'"
                    raise UserError(f"{table.path}{position}: {bad}; {advice}") from None
                skipped += 1
            index += 1
    if not examples:
        what = f"all {skipped} records are bad and were skipped" if skipped else "it is empty"
        raise UserError(f"{path_or_name} holds no usable record: {what}")
    if 0 < limit < len(examples):
        chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
        examples = [examples[i] for i in sorted(chosen)]
    return examples, skipped


# Opening


def _open(source: str, split: str) -> Iterator[_Table]:
    path = Path(source).expanduser()
    if not _looks_local(source, path):
        yield _hub(source, split)
        return
    for file in _files(source, path, split):
        try:
            if file.suffix == ".parquet":
                yield _parquet(file)
            else:
                yield _json(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _looks_local(source: str, path: Path) -> bool:
    if path.exists() or path.suffix in _SUFFIXES or source.startswith((".", "/", "~")):
        return True
    return source.count("/") > 1 or any(c in source for c in "*?[\\")


def _files(source: str, path: Path, split: str) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{source} holds no {', '.join(_SUFFIXES)} file")
        return _of_split(source, found, split)
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


def _of_split(source: str, files: list[Path], split: str) -> list[Path]:
    def names(file: Path, word: str) -> bool:
        return word in re.split(r"[^a-z0-9]+", file.stem.lower())

    chosen = [file for file in files if names(file, split.lower())]
    if not chosen and any(names(file, word) for file in files for word in _SPLITS):
        listed = ", ".join(file.name for file in files[:10])
        raise UserError(f"{source} has no file for the split {split!r} among {listed}; set data.split or name a file")
    return chosen or files


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the directory {path.parent} does not exist"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f" (looked in {path.parent.resolve()})"


def _json(file: Path) -> _Table:
    """JSON Lines, or one JSON array of records.

    Parsed by the json module rather than by `datasets`: Arrow refuses or converts a column that mixes types,
    and cannot say on which line.
    """
    with file.open("rb") as stream:
        first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        try:
            records = json.loads(file.read_text("utf-8-sig"))
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
    return _Table(str(file), list(seen), rows)


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any] | _BadRecord]]:
    with file.open("rb") as stream:  # by bytes: str.splitlines would also split at U+2028 inside a string
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            position = f":{number}"
            try:
                text = line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8")
                yield position, _object(json.loads(text))
            except json.JSONDecodeError as error:
                yield position, _BadRecord(f"not valid JSON ({error.msg} at column {error.colno})")
            except UnicodeDecodeError as error:
                yield position, _BadRecord(f"not valid UTF-8 ({error.reason} at byte {error.start + 1})")
            except RecursionError:
                yield position, _BadRecord("not valid JSON (nested too deeply)")


def _object(record: Any) -> dict[str, Any] | _BadRecord:
    if isinstance(record, dict):
        return record
    return _BadRecord(f"a record must be a JSON object, not {type(record).__name__}")


def _parquet(file: Path) -> _Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="selfplay_jax-") as cache:  # leaves nothing in the user's cache
            data = datasets.Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # whatever Arrow says about a broken file, the user's remedy is the same
        raise UserError(f"{file}: not a readable Parquet file: {_first_line(error.__cause__ or error)}") from error
    return _rows_of(str(file), data)


def _hub(source: str, split: str) -> _Table:
    import datasets

    datasets.disable_progress_bars()
    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # network, name, config, split, builder: each its own exception type
        call = f"datasets.load_dataset({name!r}{f', {config!r}' if config else ''}, split={split!r})"
        raise UserError(
            f"data source {source!r} is neither a local file nor loadable from the Hugging Face hub: {call} "
            f"failed with: {_first_line(error)}; check the name, or give a {', '.join(_SUFFIXES)} file"
        ) from error
    return _rows_of(source, data)


def _rows_of(label: str, data: Any) -> _Table:
    return _Table(label, list(data.column_names), ((f"[{i}]", row) for i, row in enumerate(data)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# From a record to an Example


def _mapping(source: str | Path, tables: list[_Table], columns: dict[str, str]) -> dict[str, str]:
    there = list(dict.fromkeys(name for table in tables for name in table.columns))
    if not columns:
        for convention in _CONVENTIONS:
            if set(convention.values()) <= set(there):
                return convention
        if not there:  # nothing but bad or no records: let the records speak
            return {"messages": "messages"}
        raise UserError(
            f"{source}: cannot tell prompt from response among the columns {', '.join(there)}; "
            'set data.columns, for example {"prompt": "...", "response": "..."}'
        )
    for field in columns:
        if field not in _FIELDS:
            raise UserError(f"data.columns has {field!r}; its keys may be {', '.join(_FIELDS)}")
    pair = {"prompt", "response"}
    if set(columns) not in ({"messages"}, pair, pair | {"rejected"}):
        raise UserError('data.columns must name "prompt" and "response" (and may name "rejected"), or "messages" alone')
    for field, name in columns.items():
        if there and name not in there:
            listed = ", ".join(there)
            raise UserError(f"{source} has no column {name!r} (data.columns[{field!r}]); its columns are {listed}")
    return columns


def _example(index: int, row: dict[str, Any], mapping: dict[str, str], where: str) -> Example:
    for name in mapping.values():
        if row.get(name) is None:
            raise _BadRecord(f"the field {name!r} is missing")
    if "messages" in mapping:
        messages, response = _split_turns(row[mapping["messages"]], mapping["messages"])
    else:
        messages, response = _answered(row, mapping)
    rejected = None
    if "rejected" in mapping:
        name = mapping["rejected"]
        value = row[name]
        rejected = _text(value, name) if isinstance(value, str) else _split_turns(value, name)[1]
    if not messages:
        raise _BadRecord("there is no prompt before the answer")
    if messages[-1]["role"] == "assistant":
        raise _BadRecord("the prompt ends with an assistant turn")
    return Example(index, tuple(messages), response, rejected, where)


def _answered(row: dict[str, Any], mapping: dict[str, str]) -> tuple[list[Message], str]:
    prompt, answer = row[mapping["prompt"]], row[mapping["response"]]
    if isinstance(prompt, list):
        messages = _turns(prompt, mapping["prompt"])
    else:
        messages = [{"role": "user", "content": _text(prompt, mapping["prompt"])}]
    if not isinstance(answer, list):
        return messages, _text(answer, mapping["response"])
    # Conversational answers hold the answer alone, or (UltraFeedback's `chosen`) the dialogue up to it.
    before, response = _split_turns(answer, mapping["response"])
    return before or messages, response


def _split_turns(value: Any, name: str) -> tuple[list[Message], str]:
    turns = _turns(value, name)
    if turns[-1]["role"] != "assistant":
        raise _BadRecord(f"{name!r} must end with an assistant turn, not with a {turns[-1]['role']} turn")
    return turns[:-1], turns[-1]["content"]


def _turns(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise _BadRecord(f"{name!r} must be a non-empty list of messages with 'role' and 'content'")
    turns = []
    for number, turn in enumerate(value):
        role, label = turn.get("role"), f"{name}[{number}].content"
        if role not in _ROLES:
            raise _BadRecord(f"{name}[{number}].role is {role!r}; roles are {', '.join(_ROLES)}")
        blank = role == "system" and turn.get("content") == ""  # a common way to say "no system prompt"
        if not blank:
            turns.append({"role": role, "content": _text(turn.get("content"), label)})
    if not turns:
        raise _BadRecord(f"{name!r} holds no text")
    return turns


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRecord(f"{name!r} must be text, not {'missing' if value is None else type(value).__name__}")
    if not value.strip():
        raise _BadRecord(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRecord(f"{name!r} holds half a surrogate pair, which is no character") from None
    return value
