"""The scale of the default presets: the built-in game, a few minutes on a laptop's CPU.

A tiny base model that knows a skill among many bad habits is fine-tuned on 100 clean examples, then plays. Every
method gets the same data and steps, and all but T-SPIN the same learning rate. See README for what came out.
"""

from ml_collections import ConfigDict


def fill(config: ConfigDict) -> None:
    """Fills a base config with the built-in game's values."""
    config.rounds = 3
    config.samples_per_prompt = 8
    config.opponents_per_prompt = 2
    config.data.update(examples=100, max_prompt_tokens=16, max_response_tokens=32)
    config.sft.update(epochs=12, batch_size=25, learning_rate=1e-4)
    config.train.update(epochs=8, batch_size=25, learning_rate=2e-4)
    config.sampling.update(max_new_tokens=32, slots=128)
    config.evaluation.update(batch_size=256)
    if "lam" in config.loss:
        config.loss.lam = 5.0  # the SPIN paper's value for its last iteration
    if "alpha" in config.loss:
        # Without a reference nothing holds the policy back: at the others' rate it forgets the skill within a round.
        config.train.learning_rate = 1e-5
