"""DPO: direct preference optimization (arXiv 2305.18290), the baseline that needs preference labels.

    python -m selfplay_jax.main --config=configs/dpo.py

The data bring a chosen and a rejected answer to each prompt; the reference is θ_0 in every round. The built-in game's
rejected answers are bad habits of its base model. GSM8K has no rejected answers, hence no such preset here.
"""

from ml_collections import ConfigDict

from configs import scales
from selfplay_jax.config import build

LOSS = {
    "beta": 0.1,  # β of the reward β·log(π_θ / π_θ0)
    "kind": "logistic",  # logistic, hinge, exponential
}


def demo(config: ConfigDict) -> None:
    """The built-in game with its base's bad habits as rejected answers; a higher rate takes the skill along."""
    scales.demo(config)
    config.train.learning_rate = 2e-5


def _ultrafeedback(config: ConfigDict, path: str, template: str) -> None:
    """One round over UltraFeedback's 61,000 pairs at 5e-7 (choice: one epoch, AdamW)."""
    scales.ultrachat(config, path, template)
    config.rounds = 1
    config.data.update(
        source=scales.ULTRAFEEDBACK, split="train_prefs", columns="prompt=prompt,response=chosen,rejected=rejected",
        turns="last", examples=0, test=scales.ULTRAFEEDBACK, test_split="test_prefs",
    )  # fmt: skip
    config.train.update(epochs=1, optimizer="adamw")


def ultrachat_qwen2_5_1_5b(config: ConfigDict) -> None:
    """UltraFeedback on the SFT policy of Qwen2.5-1.5B: --config=configs/dpo.py:ultrachat_qwen2.5_1.5b.

    Start from `configs/sft.py:ultrachat_qwen2.5_1.5b`. A baseline of TPAW's paper; no figure is repeated here.
    """
    _ultrafeedback(config, scales.sft_path("ultrachat_qwen2.5_1.5b"), "chat")


def ultrachat_llama3_1_8b(config: ConfigDict) -> None:
    """UltraFeedback on the SFT policy of Llama-3.1-8B: --config=configs/dpo.py:ultrachat_llama3.1_8b.

    Start from `configs/sft.py:ultrachat_llama3.1_8b`. A baseline of TPAW's paper; no figure is repeated here.
    """
    _ultrafeedback(config, scales.sft_path("ultrachat_llama3.1_8b"), "llama3")


def ultrachat_zephyr_7b(config: ConfigDict) -> None:
    """UltraFeedback on Zephyr-7B-SFT-full: --config=configs/dpo.py:ultrachat_zephyr_7b.

    SPIN's paper compares with Zephyr-7B-beta, made this way: SPIN matches or beats it without labels.
    """
    _ultrafeedback(config, "alignment-handbook/zephyr-7b-sft-full", "chat")


PRESETS = {
    "demo": demo,
    "ultrachat_qwen2.5_1.5b": ultrachat_qwen2_5_1_5b,
    "ultrachat_llama3.1_8b": ultrachat_llama3_1_8b,
    "ultrachat_zephyr_7b": ultrachat_zephyr_7b,
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("dpo", LOSS, PRESETS, preset)
