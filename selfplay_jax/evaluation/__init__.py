"""How good a checkpoint is: exact match of the final answer, held-out log-likelihood, and the benchmarks."""

from selfplay_jax.evaluation.evaluate import check, evaluate, parse
from selfplay_jax.evaluation.exact_match import Answers
from selfplay_jax.evaluation.subject import Subject

__all__ = ["Answers", "Subject", "check", "evaluate", "parse"]
