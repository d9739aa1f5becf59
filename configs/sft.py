"""Continued supervised fine-tuning: the control that self-play has to beat.

    python -m selfplay_jax.main --config=configs/sft.py

Each round is one more pass over the targets, evaluated like a round of play: no responses are sampled and no player
judges.
"""

from ml_collections import ConfigDict

from configs import demo
from selfplay_jax.config import build


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("sft", {}, {"demo": demo.fill}, preset)
