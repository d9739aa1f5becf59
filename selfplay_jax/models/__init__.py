"""The decoder and its road from and to Hugging Face model directories."""

from selfplay_jax.models.config import ModelConfig, RopeScaling
from selfplay_jax.models.decoder import Model
from selfplay_jax.models.hf import load_hf, read_config, save_hf

__all__ = ["Model", "ModelConfig", "RopeScaling", "load_hf", "read_config", "save_hf"]
