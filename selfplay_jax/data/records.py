"""From a record of a source to examples: which columns, which turns, and what is wrong with a bad record."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from selfplay_jax.errors import UserError

Message = dict[str, str]

TURNS = ("last", "first", "all")
MAX_TURNS = 256  # of one dialogue under turns="all": ids are record * MAX_TURNS + turn
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
# A dialogue first: beside `messages`, UltraChat's `prompt` is only how it begins.
_PROMPT_CONVENTIONS = ({"messages": "messages"}, {"prompt": "prompt"}, {"prompt": "question"})


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its annotated answer.

    id: index of the record in the full source, from 0; skipped and bad records keep their numbers. With every turn an
      example of its own (`turns="all"`) it is index * 256 + the number of the assistant's turn, from 0.
    messages: {"role", "content"} dicts, everything before the answer; never empty.
    response: the annotated (or chosen) answer, as it stands in the source.
    rejected: the dispreferred answer of preference data, else None.
    where: "file.jsonl:17" (line, from 1) or "file.parquet[16]" (row, from 0), for messages to people.
    """

    id: int
    messages: tuple[Message, ...]
    response: str
    rejected: str | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without an answer; fields as `Example`'s."""

    id: int
    messages: tuple[Message, ...]
    where: str = ""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that was left out. where: "path:17" or "path[16]"; problem: what is wrong with it."""

    where: str
    problem: str


class Malformed(Exception):
    """What is wrong with one record, to follow "file:line: "."""


def choose_columns(source: str, there: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Which column is what: `columns` if given and possible, else by the usual names.

    Raises:
      UserError: a column that is not there (those that are get named), or names that say nothing.
    """
    if not columns:
        return _by_convention(source, there, _CONVENTIONS, '{"prompt": "...", "response": "..."}')
    _check_fields(columns)
    pair = {"prompt", "response"}
    if set(columns) not in ({"messages"}, pair, pair | {"rejected"}):
        raise UserError('data.columns must name "prompt" and "response" (and may name "rejected"), or "messages" alone')
    _check_there(source, there, columns)
    return dict(columns)


def choose_prompt_column(source: str, there: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """As `choose_columns`, for prompts alone: {"prompt": column} or {"messages": column}; answers are ignored."""
    if not columns:
        return _by_convention(source, there, _PROMPT_CONVENTIONS, '{"prompt": "..."}')
    _check_fields(columns)
    chosen = {field: columns[field] for field in ("messages", "prompt") if field in columns}
    if len(chosen) != 1:
        raise UserError('data.columns must name "prompt" or "messages"')
    _check_there(source, there, chosen)
    return chosen


def _by_convention(
    source: str, there: Sequence[str], conventions: Sequence[dict[str, str]], example: str
) -> dict[str, str]:
    for convention in conventions:
        if set(convention.values()) <= set(there):
            return convention
    if not there:  # nothing but bad or no records: let the records speak
        return {"messages": "messages"}
    raise UserError(
        f"{source}: cannot tell prompt from response among the columns {', '.join(there)}; "
        f"set data.columns, for example {example}"
    )


def _check_fields(columns: Mapping[str, str]) -> None:
    for field in columns:
        if field not in _FIELDS:
            raise UserError(f"data.columns has {field!r}; its keys may be {', '.join(_FIELDS)}")


def _check_there(source: str, there: Sequence[str], columns: Mapping[str, str]) -> None:
    for field, name in columns.items():
        if there and name not in there:
            listed = ", ".join(there)
            raise UserError(f"{source} has no column {name!r} (data.columns[{field!r}]); its columns are {listed}")


def to_examples(
    index: int, row: Mapping[str, Any], columns: Mapping[str, str], turns: str, where: str
) -> list[Example]:
    """The examples of record `index`: one, or with turns="all" one per assistant turn.

    A rejected answer is compared after the chosen answer's context: where the rejected column holds a dialogue, its
    last turn alone counts, whatever its earlier turns say.

    Raises:
      Malformed: an empty, missing or non-text field, or turns that make no prompt and answer.
    """
    _check_present(row, columns)
    dialogue = _dialogue(row, columns)
    answers = [i for i, turn in enumerate(dialogue) if turn["role"] == "assistant"]
    name = columns.get("messages") or columns["response"]
    if turns == "last" and dialogue[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} must end with an assistant turn, not with a {dialogue[-1]['role']} turn")
    if not answers:
        raise Malformed(f"{name!r} has no assistant turn")
    if turns == "all" and len(answers) > MAX_TURNS:
        raise Malformed(f"{name!r} has {len(answers)} assistant turns; data.turns=all takes {MAX_TURNS} at most")
    chosen = {"last": answers[-1:], "first": answers[:1], "all": answers}[turns]
    rejected = None
    if "rejected" in columns:
        value = row[columns["rejected"]]
        rejected = _text(value, columns["rejected"]) if isinstance(value, str) else _last(value, columns["rejected"])
    examples = []
    for number, at in enumerate(chosen):
        before = tuple(dialogue[:at])
        if not before:
            raise Malformed("there is no prompt before the answer")
        if before[-1]["role"] == "assistant":
            raise Malformed("the prompt ends with an assistant turn")
        one_of_many = turns == "all"
        examples.append(
            Example(
                id=index * MAX_TURNS + number if one_of_many else index,
                messages=before,
                response=dialogue[at]["content"],
                rejected=rejected,
                where=f"{where} (assistant turn {number + 1})" if one_of_many else where,
            )
        )
    return examples


def to_prompt(index: int, row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Prompt:
    """The prompt of record `index`; of a dialogue that ends in an answer, what stands before that answer.

    Raises:
      Malformed: see `to_examples`.
    """
    _check_present(row, columns)
    name = columns.get("messages") or columns["prompt"]
    messages = _messages(row[name], name)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise Malformed("there is no prompt before the answer")
    return Prompt(index, tuple(messages), where)


def _check_present(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for name in columns.values():
        if row.get(name) is None:
            raise Malformed(f"the field {name!r} is missing")


def _dialogue(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """The whole dialogue; it ends in the answer, unless `messages` says otherwise."""
    if "messages" in columns:
        return _turns(row[columns["messages"]], columns["messages"])
    name = columns["response"]
    before, answer = _messages(row[columns["prompt"]], columns["prompt"]), row[name]
    if before[-1]["role"] == "assistant":
        raise Malformed("the prompt ends with an assistant turn")
    if not isinstance(answer, list):
        return [*before, {"role": "assistant", "content": _text(answer, name)}]
    # Conversational answers hold the answer alone, or (UltraFeedback's `chosen`) the dialogue up to it.
    after = _turns(answer, name)
    if after[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} must end with an assistant turn, not with a {after[-1]['role']} turn")
    return after if len(after) > 1 else [*before, *after]


def _messages(prompt: Any, name: str) -> list[Message]:
    return _turns(prompt, name) if isinstance(prompt, list) else [{"role": "user", "content": _text(prompt, name)}]


def _last(value: Any, name: str) -> str:
    turns = _turns(value, name)
    if turns[-1]["role"] != "assistant":
        raise Malformed(f"{name!r} must end with an assistant turn, not with a {turns[-1]['role']} turn")
    return turns[-1]["content"]


def _turns(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise Malformed(f"{name!r} must be a non-empty list of messages with 'role' and 'content'")
    turns = []
    for number, turn in enumerate(value):
        role, label = turn.get("role"), f"{name}[{number}].content"
        if role not in _ROLES:
            raise Malformed(f"{name}[{number}].role is {role!r}; roles are {', '.join(_ROLES)}")
        blank = role == "system" and turn.get("content") == ""  # a common way to say "no system prompt"
        if not blank:
            turns.append({"role": role, "content": _text(turn.get("content"), label)})
    if not turns:
        raise Malformed(f"{name!r} holds no text")
    return turns


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{name!r} must be text, not {'missing' if value is None else type(value).__name__}")
    if not value.strip():
        raise Malformed(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed(f"{name!r} holds half a surrogate pair, which is no character") from None
    return value
