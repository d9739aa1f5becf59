"""From examples to token ids within the length limits. Masks are by length; no id ever means "ignore"."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from selfplay_jax.data.sources import Example
from selfplay_jax.data.templates import Template
from selfplay_jax.errors import UserError

_BATCH = 1000  # examples whose texts go to the tokenizer together: it works on all cores


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as ids.

    id: the example's, stable over limits, skips and drops.
    prompt: ids up to where the answer begins; at least one.
    target, rejected: ids of the answers, ending in the template's end token unless cut at the limit.
    prompt_text, target_text: for people; the rendered prompt and the answer, before any cut.
    question: the last turn before the answer as the data has it, for benchmarks that write prompts of their own.
    """

    id: int
    prompt: list[int]
    target: list[int]
    rejected: list[int] | None
    prompt_text: str
    target_text: str
    question: str = ""


def encode(
    examples: Sequence[Example],
    template: Template,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    overlong: str = "drop",
    on_progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Record], dict[str, int]]:
    """Encodes every example and applies the limits.

    Args:
      max_prompt_tokens, max_response_tokens: in tokens, the end of turn included.
      overlong: "drop" leaves out examples whose prompt or answer (or rejected answer) is too long; "truncate"
        cuts prompts from the left, keeping a BOS, and answers from the right, with no invented end token.
      on_progress: called with the number of examples done since the last call.

    Returns:
      Records in order, and {"kept", "prompts_dropped", "prompts_truncated", "responses_dropped",
      "responses_truncated"}, each a number of examples. An example dropped for its prompt counts there alone.

    Raises:
      UserError: bad limit or policy, a message list that the template refuses, two examples of one id, or nothing
        left.
    """
    if overlong not in ("drop", "truncate"):
        raise UserError(f"data.overlong is {overlong!r}; it must be 'drop' or 'truncate'")
    for field, value in (
        ("max_prompt_tokens", max_prompt_tokens),
        ("max_response_tokens", max_response_tokens),
    ):
        if value < 1:
            raise UserError(f"data.{field} is {value}; it must be at least 1")
    if not examples:
        raise UserError("there are no examples to encode")
    _check_ids(examples)
    cut = overlong == "truncate"
    counts = dict.fromkeys(
        ("kept", "prompts_dropped", "prompts_truncated", "responses_dropped", "responses_truncated"), 0
    )
    records, shortest_prompt, shortest_answer = [], None, None
    for example, text, prompt, target, rejected in _encoded(examples, template, on_progress):
        answer = max(len(target), len(rejected or ()))
        long_prompt, long_answer = len(prompt) > max_prompt_tokens, answer > max_response_tokens
        if long_prompt and not cut:
            counts["prompts_dropped"] += 1
            shortest_prompt = min(len(prompt), shortest_prompt or len(prompt))
            continue
        if long_answer and not cut:
            counts["responses_dropped"] += 1
            shortest_answer = min(answer, shortest_answer or answer)
            continue
        counts["kept"] += 1
        counts["prompts_truncated"] += long_prompt
        counts["responses_truncated"] += long_answer
        prompt = _cut_left(prompt, max_prompt_tokens, template.bos_id)
        rejected = None if rejected is None else rejected[:max_response_tokens]
        target = target[:max_response_tokens]
        question = example.messages[-1]["content"]
        records.append(Record(example.id, prompt, target, rejected, text, example.response, question))
    if not records:
        limits = {"prompts": max_prompt_tokens, "responses": max_response_tokens}
        raise _all_dropped(len(examples), counts, limits, {"prompts": shortest_prompt, "responses": shortest_answer})
    return records, counts


def _all_dropped(
    total: int, counts: Mapping[str, int], limits: Mapping[str, int], shortest: Mapping[str, int | None]
) -> UserError:
    fields = {"prompts": ("prompts", "max_prompt_tokens"), "responses": ("answers", "max_response_tokens")}
    dropped = [
        f"{counts[f'{part}_dropped']} for {what} over data.{field} = {limits[part]} (the shortest has {shortest[part]})"
        for part, (what, field) in fields.items()
        if shortest[part]
    ]
    return UserError(
        f"all {total} examples were dropped, {' and '.join(dropped)}; "
        "raise the limit or set data.overlong to 'truncate'"
    )


def _check_ids(examples: Sequence[Example]) -> None:
    seen: dict[int, Example] = {}
    for example in examples:
        other = seen.setdefault(example.id, example)
        if other is not example:
            raise UserError(
                f"{example.where} and {other.where} both have the id {example.id}; responses are kept by id, so ids "
                "must differ"
            )


def _encoded(
    examples: Sequence[Example], template: Template, on_progress: Callable[[int], None]
) -> Iterator[tuple[Example, str, list[int], list[int], list[int] | None]]:
    """Every example with its prompt's text and the ids of prompt, answer and rejected answer, before any limit."""
    known: dict[int, int] = {}  # one Python int per id, not one per token: a quarter of the memory

    def shared(rows: list[list[int]]) -> list[list[int]]:
        return [[known.setdefault(i, i) for i in row] for row in rows]

    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        texts = [_prompt_text(example, template) for example in batch]
        prompts = shared(template.encode_prompt_texts(texts))
        targets = shared(template.encode_responses([example.response for example in batch]))
        wrong = [example.rejected for example in batch if example.rejected is not None]
        rejected = iter(shared(template.encode_responses(wrong)) if wrong else ())
        for example, text, prompt, target in zip(batch, texts, prompts, targets, strict=True):
            if not prompt:
                raise UserError(f"{example.where}: the tokenizer turns the prompt into no token at all: {text!r}")
            yield example, text, prompt, target, None if example.rejected is None else next(rejected)
        on_progress(len(batch))


def _prompt_text(example: Example, template: Template) -> str:
    try:
        return template.render_prompt(example.messages, example.response)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error


def _cut_left(prompt: list[int], limit: int, bos_id: int | None) -> list[int]:
    if len(prompt) <= limit:
        return prompt
    if prompt[0] != bos_id:
        return prompt[-limit:]
    return [bos_id, *prompt[len(prompt) - limit + 1 :]]
