"""T-SPIN: triplet self-play fine-tuning (arXiv 2601.08198, NeurIPS 2025).

    python -m selfplay_jax.main --config=configs/tspin.py

Each comparison is a triple: the target, an answer of θ_t, and θ_0's answer to the same prompt as a fixed anchor. No
frozen player judges, unless `reference` asks for SPIN's reward.
"""

from ml_collections import ConfigDict

from configs import scales
from selfplay_jax.config import build

LOSS = {
    "alpha": 1.0,
    "beta": 0.1,  # weight of the historical advantage; 0 is the paper's ablation (it is 0 in round 0 anyway)
    "kind": "logistic",  # logistic, hinge, exponential
    "reference": False,  # True: T-SPIN_ref, rewards are log ratios to θ_t
}


def _papers_schedule(config: ConfigDict) -> None:
    """As SPIN's, over five rounds (0..4)."""
    config.by_round = "train.learning_rate=5e-7,5e-7,1e-7,1e-7"
    config.rounds = 5


def gsm8k_qwen2_5_1_5b(config: ConfigDict) -> None:
    """GSM8K on Qwen2.5-1.5B: --config=configs/tspin.py:gsm8k_qwen2.5_1.5b.

    The paper has no run of this model or data.
    """
    scales.gsm8k(config)
    _papers_schedule(config)


def ultrachat_qwen2_5_1_5b(config: ConfigDict) -> None:
    """UltraChat on Qwen2.5-1.5B: --config=configs/tspin.py:ultrachat_qwen2.5_1.5b.

    Start from `configs/sft.py:ultrachat_qwen2.5_1.5b`. The paper has no run of this model or data.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_qwen2.5_1.5b"))
    _papers_schedule(config)


def ultrachat_llama3_1_8b(config: ConfigDict) -> None:
    """UltraChat on Llama-3.1-8B: --config=configs/tspin.py:ultrachat_llama3.1_8b.

    Start from `configs/sft.py:ultrachat_llama3.1_8b`. The paper has no run of this model or data.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_llama3.1_8b"), "llama3")
    _papers_schedule(config)


def ultrachat_zephyr_7b(config: ConfigDict) -> None:
    """UltraChat on Zephyr-7B-SFT-full: --config=configs/tspin.py:ultrachat_zephyr_7b.

    Summaries of the paper give, after iteration 4, an average of 43.47 over its tasks (SPIN 40.62; SFT on four times
    the data 42.01), and 45.02 for Mistral-7B-v0.1 (SPIN 42.32).
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
    return build("tspin", LOSS, PRESETS, preset)
