"""TPAW: team-based self-play with adaptive weights (arXiv 2605.09922, ACL 2026).

    python -m selfplay_jax.main --config=configs/tpaw.py

The `window` newest checkpoints judge, the answers of the `window` newest rounds oppose. A target that a player finds
no better than it was is boosted by η; players are weighted by softmax(-γ·margin).
"""

from ml_collections import ConfigDict

from configs import demo
from selfplay_jax.config import build

LOSS = {
    "lam": 0.1,  # λ of the rewards λ·log(π_θ / π_θj); not published, as SPIN's
    "eta": 6.0,  # η: weight of a target whose reward is not above 0
    "gamma": 0.5,  # γ: how sharply the players with the smallest margins are preferred
    "target_weighting": True,  # False: α = 1
    "player_weighting": True,  # False: β = 1 / players
    # β does not depend on the policy (it cancels in the softmax), so this changes no gradient of the policy.
    "differentiate_weights": False,
    "kind": "logistic",  # logistic, hinge, exponential
    "tolerance": 1e-6,  # rounding of the log-probabilities, relative; 1e-3 for bfloat16 compute
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("tpaw", LOSS, {"demo": demo.fill}, preset)
