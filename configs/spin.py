"""SPIN: Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models (arXiv 2401.01335, ICML 2024).

    python -m selfplay_jax.main --config=configs/spin.py

Round t trains θ_{t+1} to tell the target from θ_t's own answers, judged against θ_t. As in the authors' code, rounds
after the first take the answers of the last two rounds (`mix_previous`).
"""

from ml_collections import ConfigDict

from configs import demo
from selfplay_jax.config import build

LOSS = {
    "lam": 0.1,  # λ of the reward λ·log(π_θ / π_θt)
    "kind": "logistic",  # logistic, hinge, exponential
    "mix_previous": True,
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("spin", LOSS, {"demo": demo.fill}, preset)
