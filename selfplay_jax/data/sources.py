"""Where examples come from: files, datasets of the Hugging Face hub or saved to disk, tensorflow-datasets.

Every source ends in the same `Example`, numbered by its record's place in the full source, so that a prompt keeps its
id whatever subset of the source a run uses and however many records were skipped. `formats` and `libraries` open
sources, `records` reads their records.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from selfplay_jax.data import formats, libraries, records
from selfplay_jax.data.formats import Table
from selfplay_jax.data.records import MAX_TURNS, TURNS, BadRecord, Example, Malformed, Message, Prompt
from selfplay_jax.errors import UserError

__all__ = ["BadRecord", "Example", "Message", "Prompt", "load", "load_prompts", "load_records", "subset"]

_LARGEST_ID = 2**32 - 1  # sampling folds ids into its random keys as uint32
_T = TypeVar("_T")


def load(
    path_or_name: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    turns: str = "last",
    limit: int = 0,
    seed: int = 0,
    on_bad_record: str = "raise",
    tfds_dir: str = "",
) -> tuple[list[Example], list[BadRecord]]:
    """Reads a source and returns its examples in order, and the records that were skipped.

    Args:
      path_or_name: a .jsonl, .json or .parquet file, a directory or glob of them, a directory that `save_to_disk`
        wrote, each of them also on gs:// or s3://; a hub dataset, "owner/name" or "owner/name:config"; or "tfds:name",
        "tfds:name/config:version", "tfds:directory" for tensorflow-datasets. In a directory the files that name
        `split` are read, or all if none names a split; of a downloaded hub repository with several configs take
        "directory:config".
      split: the dataset's split, or see above; of no effect for a single file or a glob.
      columns: {"prompt": column, "response": column[, "rejected": column]} or {"messages": column}. Default:
        found out from the names prompt/chosen/rejected, prompt/response, prompt/completion, question/answer,
        messages. A prompt is a string or a list of messages; an answer is a string, or the last turn (an
        assistant's) of a list of messages.
      turns: which assistant turns of a dialogue are answers: "last", "first" (the dialogue ends there), or "all",
        each an example whose prompt is everything before it. Rejected answers go with "last" only.
      limit: at most this many records, drawn by `seed` (a larger limit adds to a smaller's draw); 0: all.
      on_bad_record: "raise", or "skip" to leave out malformed lines, and empty, missing or non-text fields.
      tfds_dir: where tensorflow-datasets lie; "" is ~/tensorflow_datasets.

    Raises:
      UserError: for every failure, naming the file and line, or what was tried on the hub.
    """
    if limit < 0:
        raise UserError(f"data.limit is {limit}; it must be 0 (all examples) or more")
    options: dict[str, Any] = {"columns": columns, "turns": turns, "on_bad_record": on_bad_record}
    found, bad = load_records(path_or_name, split=split, tfds_dir=tfds_dir, **options)
    return [example for record in subset(found, limit, seed) for example in record], bad


def load_records(
    path_or_name: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    turns: str = "last",
    on_bad_record: str = "raise",
    tfds_dir: str = "",
) -> tuple[list[list[Example]], list[BadRecord]]:
    """As `load`, without a limit and with the examples of each record together: what splits go by."""
    if turns not in TURNS:
        raise UserError(f"data.turns is {turns!r}; it must be one of {', '.join(TURNS)}")
    tables = _open(str(path_or_name), split, tfds_dir)
    mapping = records.choose_columns(str(path_or_name), _columns(tables), columns or {})
    if "rejected" in mapping and turns != "last":
        raise UserError(
            f"data.turns is {turns!r}, and {path_or_name} has rejected answers, which belong to the last turn: "
            "set data.turns to 'last', or data.columns to columns without the rejected one"
        )
    most = (_LARGEST_ID + 1) // (MAX_TURNS if turns == "all" else 1)

    def read(index: int, row: Mapping[str, Any], where: str) -> list[Example]:
        if index >= most:
            raise UserError(f"{path_or_name} has more than {most} records; data.turns={turns} cannot number them")
        return records.to_examples(index, row, mapping, turns, where)

    return _read(path_or_name, tables, read, on_bad_record)


def load_prompts(
    path_or_name: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int = 0,
    seed: int = 0,
    on_bad_record: str = "raise",
    tfds_dir: str = "",
) -> tuple[list[Prompt], list[BadRecord]]:
    """Reads prompts from a source that need not have answers, for sampling alone; arguments as `load`'s.

    columns: {"prompt": column} or {"messages": column} (others are ignored). Default: messages, prompt or question. Of
    a dialogue that ends in an assistant turn, the prompt is what stands before that turn.
    """
    tables = _open(str(path_or_name), split, tfds_dir)
    mapping = records.choose_prompt_column(str(path_or_name), _columns(tables), columns or {})
    prompts, bad = _read(
        path_or_name,
        tables,
        lambda index, row, where: records.to_prompt(index, row, mapping, where),
        on_bad_record,
    )
    return subset(prompts, limit, seed), bad


def _open(source: str, split: str, tfds_dir: str) -> list[Table]:
    if source.startswith(libraries.TFDS):
        return [libraries.open_tfds(source.removeprefix(libraries.TFDS), split, tfds_dir)]
    path = formats.local_path(source)
    if path is None:
        return [libraries.open_hub(source, split)]
    if libraries.is_saved(path):
        return [libraries.open_saved(path, split)]
    return formats.open_files(source, path, split)


def subset(items: Sequence[_T], limit: int, seed: int) -> list[_T]:
    """At most `limit` items in order, drawn by `seed`; a larger limit adds to a smaller's draw. 0: all."""
    if not 0 < limit < len(items):
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:limit]
    return [items[i] for i in sorted(chosen)]


def _columns(tables: Sequence[Table]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table.columns))


def _read(
    source: str | Path,
    tables: Sequence[Table],
    read: Callable[[int, Mapping[str, Any], str], _T],
    on_bad_record: str,
) -> tuple[list[_T], list[BadRecord]]:
    """Every record through `read`, and those it found malformed."""
    if on_bad_record not in ("raise", "skip"):
        raise UserError(f"data.on_bad_record is {on_bad_record!r}; it must be 'raise' or 'skip'")
    found: list[_T] = []
    bad: list[BadRecord] = []
    index = 0
    for table in tables:
        for position, row in table.rows:
            try:
                if isinstance(row, Malformed):
                    raise row
                found.append(read(index, row, Path(table.path).name + position))
            except Malformed as problem:
                if on_bad_record == "raise":
                    advice = "mend the record, or set data.on_bad_record to 'skip'"
                    raise UserError(f"{table.path}{position}: {problem}; {advice}") from None
                bad.append(BadRecord(f"{table.path}{position}", str(problem)))
            index += 1
    if not found:
        what = f"all {len(bad)} records are bad and were skipped" if bad else "it is empty"
        raise UserError(f"{source} holds no usable record: {what}")
    return found, bad
