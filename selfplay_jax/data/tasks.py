"""The three lists of records a run works on: train, validation, test."""

import dataclasses
from typing import Any

import numpy as np

from selfplay_jax.data import builtin, sources, tokens
from selfplay_jax.data.sources import Example
from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """Records by use; no record is in two lists of one source. counts: what the length limits and bad records cost."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    counts: dict[str, Any]


def load(data: Any, template: Template, seed: int) -> Task:
    """Reads what the `data` fields of the config name, within its limits.

    Raises:
      UserError: see `sources.load` and `tokens.encode`; or nothing is left to train on after the held-out examples.
    """
    splits, skipped = _builtin(data, seed) if data.source == "builtin" else _files(data, seed)
    counts: dict[str, Any] = {"bad_records_skipped": skipped}
    encoded: dict[str, list[Record]] = {}
    for name, examples in splits.items():
        if not examples:
            encoded[name] = []
            continue
        encoded[name], counts[name] = tokens.encode(
            examples,
            template,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            overlong=data.overlong,
        )
    return Task(counts=counts, **encoded)


def _builtin(data: Any, seed: int) -> tuple[dict[str, list[Example]], int]:
    # The problems are fixed whatever the run's seed, so that runs with different seeds are comparable, but for the
    # training set: it is what a seed draws anew.
    return {
        "train": builtin.examples("train", data.examples or 100, seed),
        "validation": builtin.examples("validation", data.validation_examples, 0),
        "test": builtin.examples("test", data.test_examples, 0),
    }, 0


def _columns(text: str) -> dict[str, str]:
    """ "prompt=instruction,response=output" as a mapping."""
    pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"config.data.columns={text!r} must read like prompt=instruction,response=output.")
    return {name.strip(): column.strip() for name, column in pairs}


def _files(data: Any, seed: int) -> tuple[dict[str, list[Example]], int]:
    options: dict[str, Any] = {"columns": _columns(data.columns), "on_bad_record": data.on_bad_record}
    examples, skipped = sources.load(data.source, split=data.split, **options)
    order = np.random.default_rng(seed).permutation(len(examples))
    test: list[Example] = []
    if data.test:
        test, more = sources.load(data.test, split=data.test_split, limit=data.test_examples, seed=seed, **options)
        skipped += more
    held = data.validation_examples + (0 if data.test else data.test_examples)
    if held >= len(examples):
        raise UserError(
            f"{data.source} has {len(examples)} records and {held} are to be held back (data.validation_examples"
            f"{'' if data.test else ' and data.test_examples'}): lower them."
        )

    def take(start: int, count: int) -> list[Example]:
        return [examples[i] for i in sorted(order[start : start + count])]

    validation = take(0, data.validation_examples)
    if not data.test:
        test = take(data.validation_examples, data.test_examples)
    left = len(examples) - held
    train = take(held, min(data.examples, left) if data.examples else left)
    return {"train": train, "validation": validation, "test": test}, skipped
