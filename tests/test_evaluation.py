"""Exact match of the final answer, and means with their standard errors."""

import numpy as np
import pytest

from selfplay_jax.config import base
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation.exact_match import Answers, mean_and_error

PATTERN = base().evaluation.answer  # the default
ANSWERS = Answers(PATTERN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"),
        ("so\n#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("# 5.0", "5"),
        ("#5", "5"),
        ("#### -12", "-12"),
        ("####    42  ", "42"),
        ("####\n42", "42"),
        ("#### 7.", "7"),  # the sentence's full stop is no decimal point
        ("#### 007", "7"),
        ("#### 100", "100"),  # not 1E+2
        ("#### 0", "0"),
        ("#### 0.00", "0"),
        ("#### -0", "0"),
        ("#### 3 no, #### 4", "4"),  # the last counts
        ("# 1\n# 2\n# ", "2"),
        ("the answer is 7", None),
        ("", None),
        ("#### seven", None),
        ("#", None),
        ("#### 123456789012345678901234567890123", "123456789012345678901234567890123"),
    ],
)
def test_find(text, expected):
    assert ANSWERS.find(text) == expected


def test_correct_compares_numbers_not_spellings():
    texts = ["#### 1,234", "# 5", "#### 6", "no idea", "#### 1234.0", "#### 8", "none"]
    targets = ["#### 1234", "#### 5.0", "#### 7", "#### 3", "#### 1,234", "no answer here", "nor here"]
    right = ANSWERS.correct(texts, targets)
    assert right.dtype == bool
    assert right.tolist() == [True, True, False, False, True, False, False]


def test_long_numbers_are_not_rounded_into_each_other():
    digits = "1" * 40
    assert ANSWERS.correct([f"#### {digits}1"], [f"#### {digits}2"]).tolist() == [False]


def test_as_many_texts_as_targets():
    with pytest.raises(ValueError, match="zip"):
        ANSWERS.correct(["#### 1"], ["#### 1", "#### 2"])


def test_answers_that_are_no_numbers_are_compared_as_text():
    answers = Answers(r"answer: *([A-D]|[a-z ]+)")
    assert answers.find("answer: B") == "B"
    assert answers.correct(["answer:  yes ", "answer: A"], ["answer: yes", "answer: B"]).tolist() == [True, False]


def test_a_group_that_took_no_part_is_no_answer():
    assert Answers(r"#(?: (\d+))?").find("#") is None
    assert Answers(r"#(?: (\d+))?").find("# 3 and #") == "3"


@pytest.mark.parametrize("pattern", [r"# (\d+", r"*", r"(?P<x>"])
def test_a_pattern_that_is_no_regular_expression(pattern):
    with pytest.raises(UserError, match=r"config\.evaluation\.answer=.*is no regular expression"):
        Answers(pattern)


def test_a_pattern_without_a_group():
    with pytest.raises(UserError, match=r"config\.evaluation\.answer=.*needs a group"):
        Answers(r"# \d+")


def test_mean_and_error_is_the_standard_error_over_prompts():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, 300) / 4
    mean, error = mean_and_error(values)
    assert isinstance(mean, float) and isinstance(error, float)
    np.testing.assert_allclose(mean, values.sum() / 300, rtol=1e-12)
    np.testing.assert_allclose(error, np.sqrt(((values - values.mean()) ** 2).sum() / 299 / 300), rtol=1e-12)


def test_mean_and_error_by_hand():
    assert mean_and_error(np.array([0.0, 1.0, 1.0, 0.0])) == pytest.approx((0.5, (1 / 12) ** 0.5))
    assert mean_and_error(np.array([0.25])) == (0.25, 0.0)
    assert mean_and_error(np.array([True, True])) == (1.0, 0.0)
