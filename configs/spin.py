"""SPIN: Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models (arXiv 2401.01335, ICML 2024).

    python -m selfplay_jax.main --config=configs/spin.py

Round t trains θ_{t+1} to tell the target from θ_t's own answers, judged against θ_t. As in the authors' code, rounds
after the first take the answers of the last two rounds (`mix_previous`).
"""

from ml_collections import ConfigDict

from configs import scales
from selfplay_jax.config import build

LOSS = {
    "lam": 0.1,  # λ of the reward λ·log(π_θ / π_θt)
    "kind": "logistic",  # logistic, hinge, exponential
    "mix_previous": True,
}


def _papers_schedule(config: ConfigDict) -> None:
    """The paper's: the rate falls after two iterations, λ rises in the last."""
    config.by_round = "train.learning_rate=5e-7,5e-7,1e-7,1e-7;loss.lam=0.1,0.1,0.1,5.0"


def gsm8k_qwen2_5_1_5b(config: ConfigDict) -> None:
    """GSM8K on Qwen2.5-1.5B: --config=configs/spin.py:gsm8k_qwen2.5_1.5b.

    TPAW's paper runs SPIN there as a baseline; no figure is repeated here.
    """
    scales.gsm8k(config)
    _papers_schedule(config)


def ultrachat_qwen2_5_1_5b(config: ConfigDict) -> None:
    """UltraChat on Qwen2.5-1.5B: --config=configs/spin.py:ultrachat_qwen2.5_1.5b.

    Start from `configs/sft.py:ultrachat_qwen2.5_1.5b`.
    TPAW's paper runs SPIN there as a baseline; no figure is repeated here.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_qwen2.5_1.5b"))
    _papers_schedule(config)


def ultrachat_llama3_1_8b(config: ConfigDict) -> None:
    """UltraChat on Llama-3.1-8B: --config=configs/spin.py:ultrachat_llama3.1_8b.

    Start from `configs/sft.py:ultrachat_llama3.1_8b`.
    TPAW's paper runs SPIN there as a baseline; no figure is repeated here.
    """
    scales.ultrachat(config, scales.sft_path("ultrachat_llama3.1_8b"), "llama3")
    _papers_schedule(config)


def ultrachat_zephyr_7b(config: ConfigDict) -> None:
    """UltraChat on Zephyr-7B-SFT-full: --config=configs/spin.py:ultrachat_zephyr_7b.

    The paper reports an Open LLM Leaderboard v1 average of 58.14 for the start and 63.16 after the last iteration.
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
    return build("spin", LOSS, PRESETS, preset)
