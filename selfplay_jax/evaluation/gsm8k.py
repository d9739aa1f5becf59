"""GSM8K as lm-evaluation-harness asks and scores it (task `gsm8k`, version 3), without the harness.

A prompt is worked examples and a question; the answer counts under two readings of the generated text. Strict: the
first `#### number`. Flexible: the last number of any form.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfplay_jax.evaluation.exact_match import mean_and_error

# Where a generated text is cut, and how long it may get.
UNTIL = ("Question:", "</s>", "<|im_end|>")
MAX_NEW_TOKENS = 256
SHOTS = 5

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NO_ANSWER = "[invalid]"
# Taken out of answers before they are compared, in this order.
_IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]


class Problem(NamedTuple):
    """A question and its worked answer, which ends in `#### number`."""

    question: str
    answer: str


def draw_shots(train: Sequence[Problem], count: int, questions: int, *, seed: int = 1234) -> list[list[Problem]]:
    """`count` training problems for each question, drawn anew for each one as lm-eval does; 1234 is its seed."""
    rng, pool = random.Random(seed), list(train)
    return [rng.sample(pool, count) for _ in range(questions)]


def few_shot_prompt(question: str, shots: Sequence[Problem] = ()) -> str:
    """The prompt as lm-eval writes it: each shot with its answer, then the question, blank lines between."""
    worked = [f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
    return "".join(worked) + f"Question: {question}\nAnswer:"


def few_shot_messages(question: str, shots: Sequence[Problem] = ()) -> list[dict[str, str]]:
    """The same as a dialogue for a chat template: each shot a turn of the user and one of the assistant."""
    turns = [
        {"role": role, "content": content}
        for shot in shots
        for role, content in (("user", few_shot_prompt(shot.question)), ("assistant", shot.answer))
    ]
    return [*turns, {"role": "user", "content": few_shot_prompt(question)}]


def strict_answer(text: str) -> str:
    """The first number after `#### `, as written; "[invalid]" without one."""
    found = _STRICT.search(text)
    return found.group(1).strip() if found else _NO_ANSWER


def flexible_answer(text: str) -> str:
    """The last number, as written (dollar sign, commas and full stop may be part of it); "[invalid]" without one."""
    found = _FLEXIBLE.findall(text)
    return next(filter(None, found[-1])).strip() if found else _NO_ANSWER


def normalised(answer: str) -> str:
    """What is compared: no commas, no dollar signs, nothing up to the last `#### `, no full stop; lower case."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


def score(texts: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether each generated text has the number that its annotated answer ends in.

    Args:
      texts: what was generated, cut at `UNTIL`.
      answers: worked answers with `#### number`, or numbers.
    Returns:
      {"strict": bool [N], "flexible": bool [N]}.
    """
    expected = [normalised(answer) for answer in answers]
    pairs = list(zip(texts, expected, strict=True))
    return {
        "strict": np.array([normalised(strict_answer(text)) == wanted for text, wanted in pairs], bool),
        "flexible": np.array([normalised(flexible_answer(text)) == wanted for text, wanted in pairs], bool),
    }


def evaluate(
    generate_texts: Callable[[list[str]], list[str]],
    test: Sequence[Problem],
    shots: Sequence[Sequence[Problem]] = (),
    *,
    chat: Callable[[list[dict[str, str]]], str] | None = None,
) -> dict[str, Any]:
    """Accuracies of a model over the test problems.

    Args:
      generate_texts: from prompts to greedy texts of at most `MAX_NEW_TOKENS` tokens, cut at `UNTIL` (see
        `texts.generate_texts`).
      shots: worked examples for each problem (see `draw_shots`); without any it is zero-shot.
      chat: renders a dialogue as a prompt (`Template.render_prompt`); None writes plain prompts.
    Returns:
      {"n", "shots", "strict", "strict_se", "flexible", "flexible_se"}: accuracies and standard errors over problems.
    Raises:
      ValueError: shots for another number of problems.
    """
    examples: list[Sequence[Problem]] = list(shots) or [()] * len(test)
    asked = list(zip((problem.question for problem in test), examples, strict=True))
    if chat is None:
        prompts = [few_shot_prompt(question, worked) for question, worked in asked]
    else:
        prompts = [chat(few_shot_messages(question, worked)) for question, worked in asked]
    right = score(generate_texts(prompts), [problem.answer for problem in test])
    result: dict[str, Any] = {"n": len(test), "shots": max(map(len, examples), default=0)}
    for name, values in right.items():
        result[name], result[f"{name}_se"] = mean_and_error(values.astype(np.float64))
    return result
