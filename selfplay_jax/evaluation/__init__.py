"""How good a checkpoint is: exact match of the final answer, held-out log-likelihood, and the benchmarks."""

from selfplay_jax.evaluation.evaluate import Subject, evaluate, parse
from selfplay_jax.evaluation.exact_match import Answers

__all__ = ["Answers", "Subject", "evaluate", "parse"]
