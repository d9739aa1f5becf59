"""The three lists of records a run works on: train, validation, test; and what they are, for the record."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from selfplay_jax.data import builtin, cache, sources
from selfplay_jax.data.sources import BadRecord, Example
from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.errors import UserError
from selfplay_jax.progress import progress

SPLITS = ("train", "validation", "test")
_WORTH_A_BAR = 5000  # examples, a second's work


@dataclasses.dataclass(frozen=True)
class Task:
    """Records by use; no record is in two lists of one source.

    counts: by split, what the length limits cost, see `tokens.encode`.
    bad: the records that were skipped, in the order of the sources.
    identity: what the data are, see `identify`; `describe` is all of it for data.json.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    counts: dict[str, dict[str, int]]
    bad: list[BadRecord]
    identity: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What data.json holds: the identity, and by split what the limits cost."""
        splits = {name: {**self.identity[name], **self.counts.get(name, {})} for name in SPLITS}
        return {**self.identity, **splits, "bad_records_skipped": len(self.bad)}


def load(data: Any, template: Template, seed: int) -> Task:
    """Reads what the `data` fields of the config name, within its limits.

    Raises:
      UserError: see `sources.load` and `tokens.encode`; or nothing is left to train on after the held-out examples.
    """
    splits, bad = _builtin(data, seed) if data.source == "builtin" else _files(data, seed)
    counts: dict[str, dict[str, int]] = {}
    encoded: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for name, examples in splits.items():
        if not examples:
            continue
        with _bar(f"tokenising the {name} examples", len(examples)) as advance:
            encoded[name], counts[name] = cache.encode(
                examples,
                template,
                "" if data.source == "builtin" else data.cache,
                max_prompt_tokens=data.max_prompt_tokens,
                max_response_tokens=data.max_response_tokens,
                overlong=data.overlong,
                on_progress=advance,
            )
    return Task(**encoded, counts=counts, bad=bad, identity=identify(data, template, encoded))


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    if total < _WORTH_A_BAR:
        yield lambda count: None
    else:
        with progress(title, total=total, unit="examples") as bar:
            yield bar.advance


def identify(data: Any, template: Template, records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """What the data of a run are: template and tokenizer, and by split the source, the number and a hash of the ids.

    The hash is over (id, prompt ids, target ids, rejected ids) of every record in order, each list with its length.
    """
    held_back = (data.source, data.split)
    tests = (data.test, data.test_split) if data.test else held_back
    identity: dict[str, Any] = {
        "template": template.kind,
        "template_sha256": template.sha256,
        "tokenizer_sha256": template.tokenizer_sha256,
    }
    for name, (source, split) in zip(SPLITS, (held_back, held_back, tests), strict=True):
        if data.source == "builtin":
            split = name
        rows = records[name]
        identity[name] = {"examples": len(rows), "sha256": _hash(rows), "source": source, "split": split}
    return identity


def _hash(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        lists = (record.prompt, record.target, record.rejected)
        header = [record.id, *(-1 if ids is None else len(ids) for ids in lists)]
        digest.update(np.array([*header, *itertools.chain(*(ids or () for ids in lists))], "<i8").tobytes())
    return digest.hexdigest()


def check_same(recorded: Mapping[str, Any], task: Task, workdir: object) -> None:
    """Refuses to go on in a workdir whose data.json, `recorded`, tells of other data.

    Raises:
      UserError: naming what changed.
    """
    changed = [
        f"the {name} examples"
        for name in SPLITS
        if _differs(recorded.get(name, {}), task.identity[name], ("examples", "sha256"))
    ]
    for what in ("template", "tokenizer"):
        if _differs(recorded, task.identity, (f"{what}_sha256",)):
            changed.append(f"the {what}")
    if changed:
        raise UserError(
            f"the data changed under the run in {workdir}; different from what its data.json tells: "
            f"{', '.join(changed)}. Bring back what was, or take another --workdir."
        )


def _differs(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(name in before and before[name] != now[name] for name in names)


def _builtin(data: Any, seed: int) -> tuple[dict[str, list[Example]], list[BadRecord]]:
    # The problems are fixed whatever the run's seed, so that runs with different seeds are comparable, but for the
    # training set: it is what a seed draws anew.
    return {
        "train": builtin.examples("train", data.examples or 100, seed),
        "validation": builtin.examples("validation", data.validation_examples, 0),
        "test": builtin.examples("test", data.test_examples, 0),
    }, []


def _columns(text: str) -> dict[str, str]:
    """ "prompt=instruction,response=output" as a mapping."""
    pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"config.data.columns={text!r} must read like prompt=instruction,response=output.")
    return {name.strip(): column.strip() for name, column in pairs}


def _files(data: Any, seed: int) -> tuple[dict[str, list[Example]], list[BadRecord]]:
    """Splits go by record: the turns of one dialogue never land in two of them."""
    options: dict[str, Any] = {
        "columns": _columns(data.columns),
        "turns": data.turns,
        "on_bad_record": data.on_bad_record,
        "tfds_dir": data.tfds_dir,
    }
    found, bad = sources.load_records(data.source, split=data.split, **options)
    order = np.random.default_rng(seed).permutation(len(found))
    test: list[Example] = []
    if data.test:
        test, more = sources.load(data.test, split=data.test_split, limit=data.test_examples, seed=seed, **options)
        bad = bad + more
    held = data.validation_examples + (0 if data.test else data.test_examples)
    if held >= len(found):
        raise UserError(
            f"{data.source} has {len(found)} records and {held} are to be held back (data.validation_examples"
            f"{'' if data.test else ' and data.test_examples'}): lower them."
        )

    def take(start: int, count: int) -> list[Example]:
        return [example for i in sorted(order[start : start + count]) for example in found[i]]

    validation = take(0, data.validation_examples)
    if not data.test:
        test = take(data.validation_examples, data.test_examples)
    left = len(found) - held
    train = take(held, min(data.examples, left) if data.examples else left)
    return {"train": train, "validation": validation, "test": test}, bad
