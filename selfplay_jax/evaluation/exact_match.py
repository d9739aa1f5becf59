"""Exact match of the final answer, as GSM8K is scored: the last `#### number` of the text, compared as a number."""

import decimal
import re
from collections.abc import Sequence

import numpy as np

from selfplay_jax.errors import UserError


class Answers:
    """Finds and compares final answers.

    pattern: a regular expression whose first group is the answer; the last match in a text counts.
    """

    def __init__(self, pattern: str):
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.evaluation.answer={pattern!r} is no regular expression: {error}.") from error
        if self._pattern.groups < 1:
            raise UserError(f"config.evaluation.answer={pattern!r} needs a group, (...), around the answer.")

    def find(self, text: str) -> str | None:
        """The answer of a text in canonical form (numbers without commas or trailing zeros), None without one."""
        found = [match.group(1) for match in self._pattern.finditer(text) if match.group(1) is not None]
        if not found:
            return None
        try:
            number = decimal.Decimal(found[-1].replace(",", ""))
        except decimal.InvalidOperation:
            return found[-1].strip()
        # Not `normalize`, which rounds to 28 digits: two long wrong numbers must not become one.
        plain = format(number, "f") if abs(number.adjusted()) < 1000 else str(number)
        plain = plain.rstrip("0").removesuffix(".") if "." in plain else plain
        return "0" if plain == "-0" else plain

    def correct(self, texts: Sequence[str], targets: Sequence[str]) -> np.ndarray:
        """Whether each text ends in its target's answer, bool; a target without an answer is never met."""
        expected = [self.find(target) for target in targets]
        return np.array([e is not None and self.find(t) == e for t, e in zip(texts, expected, strict=True)], bool)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over independent prompts and its standard error; values [N] are per-prompt means."""
    count = len(values)
    spread = float(np.std(values, ddof=1)) if count > 1 else 0.0
    return float(np.mean(values)), spread / count**0.5
