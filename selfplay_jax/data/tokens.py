"""From examples to token ids within the length limits. Masks are by length; no id ever means "ignore"."""

import dataclasses
from collections.abc import Sequence

from selfplay_jax.data.sources import Example
from selfplay_jax.data.templates import Template
from selfplay_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as ids.

    id: the example's, stable over limits, skips and drops.
    prompt: ids up to where the answer begins; at least one.
    target, rejected: ids of the answers, ending in the template's end token unless cut at the limit.
    prompt_text, target_text: for people; the rendered prompt and the answer, before any cut.
    """

    id: int
    prompt: list[int]
    target: list[int]
    rejected: list[int] | None
    prompt_text: str
    target_text: str


def encode(
    examples: Sequence[Example],
    template: Template,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    overlong: str = "drop",
) -> tuple[list[Record], dict[str, int]]:
    """Encodes every example and applies the limits.

    Args:
      max_prompt_tokens, max_response_tokens: in tokens, the end of turn included.
      overlong: "drop" leaves out examples whose prompt or answer (or rejected answer) is too long; "truncate"
        cuts prompts from the left, keeping a BOS, and answers from the right, with no invented end token.

    Returns:
      Records in order, and {"kept", "prompts_dropped", "prompts_truncated", "responses_dropped",
      "responses_truncated"}, each a number of examples. An example dropped for its prompt counts there alone.

    Raises:
      UserError: bad limit or policy, a message list that the template refuses, or nothing left.
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
    cut = overlong == "truncate"
    counts = dict.fromkeys(
        ("kept", "prompts_dropped", "prompts_truncated", "responses_dropped", "responses_truncated"), 0
    )
    records, shortest_prompt, shortest_answer = [], None, None
    for example in examples:
        text, prompt = _prompt(example, template)
        target = template.encode_response(example.response)
        rejected = None if example.rejected is None else template.encode_response(example.rejected)
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
        records.append(Record(example.id, prompt, target, rejected, text, example.response))
    if not records:
        dropped = []
        if shortest_prompt:
            dropped.append(
                f"{counts['prompts_dropped']} for prompts over data.max_prompt_tokens = {max_prompt_tokens} "
                f"(the shortest has {shortest_prompt})"
            )
        if shortest_answer:
            dropped.append(
                f"{counts['responses_dropped']} for answers over data.max_response_tokens = "
                f"{max_response_tokens} (the shortest has {shortest_answer})"
            )
        raise UserError(
            f"all {len(examples)} examples were dropped, {' and '.join(dropped)}; "
            "raise the limit or set data.overlong to 'truncate'"
        )
    return records, counts


def _prompt(example: Example, template: Template) -> tuple[str, list[int]]:
    try:
        text = template.render_prompt(example.messages)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    ids = template.encode_rendered(text)
    if not ids:
        raise UserError(f"{example.where}: the tokenizer turns the prompt into no token at all: {text!r}")
    return text, ids


def _cut_left(prompt: list[int], limit: int, bos_id: int | None) -> list[int]:
    if len(prompt) <= limit:
        return prompt
    if prompt[0] != bos_id:
        return prompt[-limit:]
    return [bos_id, *prompt[len(prompt) - limit + 1 :]]
