"""Self-play fine-tuning of language models in JAX: SPIN, T-SPIN and TPAW."""

__version__ = "0.1.0"
