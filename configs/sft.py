"""Supervised fine-tuning: what makes the SFT policy, and, continued, the control that self-play has to beat.

    python -m selfplay_jax.main --config=configs/sft.py

Each round is one more pass over the targets, evaluated like a round of play: no responses are sampled and no player
judges. The control at scale is an ultrachat preset with the other methods' data and steps, from the SFT policy:

    python -m selfplay_jax.main --config=configs/sft.py:ultrachat_qwen2.5_1.5b --workdir=runs/continued \
      --config.model.path=runs/sft-ultrachat_qwen2.5_1.5b/hf/final --config.data.examples=50000 \
      --config.data.turns=first --config.rounds=4 --config.train.epochs=2 --config.train.batch_size=64
"""

from ml_collections import ConfigDict

from configs import scales
from selfplay_jax.config import build


def gsm8k_qwen2_5_1_5b(config: ConfigDict) -> None:
    """Continued SFT on GSM8K: --config=configs/sft.py:gsm8k_qwen2.5_1.5b.

    TPAW's paper has SFT as a baseline there; no figure is repeated here.
    """
    scales.gsm8k(config)
    config.train.update(learning_rate=1e-5, optimizer="adamw")


def _ultrachat(config: ConfigDict, base: str, template: str) -> None:
    """One epoch over all turns of all 208,000 dialogues at 2e-5, batch 128 (choice: the alignment handbook's)."""
    scales.ultrachat(config, base, template)
    config.rounds = 1
    config.data.update(turns="all", examples=0)
    config.train.update(epochs=1, batch_size=128, optimizer="adamw", learning_rate=2e-5, schedule="cosine", warmup=0.1)
    config.evaluation.run = "likelihood"


def ultrachat_qwen2_5_1_5b(config: ConfigDict) -> None:
    """Makes TPAW's start for Qwen2.5-1.5B: --config=configs/sft.py:ultrachat_qwen2.5_1.5b."""
    _ultrachat(config, "Qwen/Qwen2.5-1.5B", "chat")


def ultrachat_llama3_1_8b(config: ConfigDict) -> None:
    """Makes TPAW's start for Llama-3.1-8B: --config=configs/sft.py:ultrachat_llama3.1_8b."""
    _ultrachat(config, "meta-llama/Llama-3.1-8B", "llama3")


def ultrachat_zephyr_7b(config: ConfigDict) -> None:
    """Makes a Zephyr-7B-SFT-full of one's own: --config=configs/sft.py:ultrachat_zephyr_7b.

    SPIN's paper reports 58.14 as the public one's average on Open LLM Leaderboard v1; T-SPIN's 42.01 on its own set for
    SFT on the whole of UltraChat200k (as summaries of the paper give it).
    """
    _ultrachat(config, "mistralai/Mistral-7B-v0.1", "zephyr")


PRESETS = {
    "demo": scales.demo,
    "gsm8k_qwen2.5_1.5b": gsm8k_qwen2_5_1_5b,
    "ultrachat_qwen2.5_1.5b": ultrachat_qwen2_5_1_5b,
    "ultrachat_llama3.1_8b": ultrachat_llama3_1_8b,
    "ultrachat_zephyr_7b": ultrachat_zephyr_7b,
}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of one preset; the default is the built-in game."""
    return build("sft", {}, PRESETS, preset)
