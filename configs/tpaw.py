"""TPAW: team-based self-play with adaptive weights (arXiv 2605.09922, ACL 2026).

    python -m selfplay_jax.main --config=configs/tpaw.py

The `window` newest checkpoints judge, the answers of the `window` newest rounds oppose. A target that a player finds
no better than it was is boosted by η; players are weighted by softmax(-γ·margin).
"""

from ml_collections import ConfigDict

from configs import scales
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


def _papers_schedule(config: ConfigDict) -> None:
    """As SPIN's rates (choice: the paper gives none we could read)."""
    config.by_round = "train.learning_rate=5e-7,5e-7,1e-7,1e-7"


def gsm8k_qwen2_5_1_5b(config: ConfigDict) -> None:
    """GSM8K on Qwen2.5-1.5B: --config=configs/tpaw.py:gsm8k_qwen2.5_1.5b.

    The paper reports gains over SFT and SPIN there; we have not seen its tables and repeat no figure.
    """
    scales.gsm8k(config)
    _papers_schedule(config)


def ultrachat_qwen2_5_1_5b(config: ConfigDict) -> None:
    """UltraChat on Qwen2.5-1.5B: --config=configs/tpaw.py:ultrachat_qwen2.5_1.5b.

    Start from `configs/sft.py:ultrachat_qwen2.5_1.5b`.
    The paper reports gains over SFT and SPIN there; we have not seen its tables and repeat no figure.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_qwen2.5_1.5b"))
    _papers_schedule(config)


def ultrachat_llama3_1_8b(config: ConfigDict) -> None:
    """UltraChat on Llama-3.1-8B: --config=configs/tpaw.py:ultrachat_llama3.1_8b.

    Start from `configs/sft.py:ultrachat_llama3.1_8b`.
    The paper reports gains over SFT and SPIN there; we have not seen its tables and repeat no figure.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_llama3.1_8b"), "llama3")
    _papers_schedule(config)


def ultrachat_zephyr_7b(config: ConfigDict) -> None:
    """UltraChat on Zephyr-7B-SFT-full: --config=configs/tpaw.py:ultrachat_zephyr_7b.

    The paper has no run of this model: for comparison with SPIN and T-SPIN.
    """
    scales.ultrachat(config, "alignment-handbook/zephyr-7b-sft-full")
    _papers_schedule(config)


PRESETS = {
    "demo": scales.demo,
    "gsm8k_qwen2.5_1.5b": gsm8k_qwen2_5_1_5b,
    "ultrachat_qwen2.5_1.5b": ultrachat_qwen2_5_1_5b,
    "ultrachat_llama3.1_8b": ultrachat_llama3_1_8b,
    "ultrachat_zephyr_7b": ultrachat_zephyr_7b,
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("tpaw", LOSS, PRESETS, preset)
