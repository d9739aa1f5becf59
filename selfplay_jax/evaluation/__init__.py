"""How good a checkpoint is: exact match of the final answer, and held-out log-likelihood."""

from selfplay_jax.evaluation.evaluate import evaluate
from selfplay_jax.evaluation.exact_match import Answers

__all__ = ["Answers", "evaluate"]
