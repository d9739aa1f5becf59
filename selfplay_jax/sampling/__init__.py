"""Sampling responses: prefill, a jitted decode loop, slots that are refilled as responses finish."""

from selfplay_jax.sampling.filters import SamplingFilter
from selfplay_jax.sampling.generate import Samples, generate

__all__ = ["Samples", "SamplingFilter", "generate"]
