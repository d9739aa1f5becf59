"""T-SPIN: triplet self-play fine-tuning (arXiv 2601.08198, NeurIPS 2025).

    python -m selfplay_jax.main --config=configs/tspin.py

Each comparison is a triple: the target, an answer of θ_t, and θ_0's answer to the same prompt as a fixed anchor. No
frozen player judges, unless `reference` asks for SPIN's reward.
"""

from ml_collections import ConfigDict

from configs import demo
from selfplay_jax.config import build

LOSS = {
    "alpha": 1.0,
    "beta": 0.1,  # weight of the historical advantage; 0 is the paper's ablation (it is 0 in round 0 anyway)
    "kind": "logistic",  # logistic, hinge, exponential
    "reference": False,  # True: T-SPIN_ref, rewards are log ratios to θ_t
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("tspin", LOSS, {"demo": demo.fill}, preset)
