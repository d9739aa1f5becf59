"""Scales: which model and data, which limits, how often evaluated. A method's file adds its own schedule.

Only `demo` has been run as it stands here. The others are the papers' settings, to be run on a pod; where a paper is
silent the value is a choice of ours, marked so.
"""

from ml_collections import ConfigDict

# The first turns of 50,000 dialogues, as SPIN took them; the subset is fixed by config.seed.
ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


def demo(config: ConfigDict) -> None:
    """The built-in game, a few minutes on a laptop's CPU: 100 clean examples for a tiny base with many bad habits.

    Every method gets the same data and steps, and all but T-SPIN the same learning rate. See README for what came out.
    """
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


def _papers(config: ConfigDict) -> None:
    """What SPIN's paper and code set and later papers took over: RMSProp, batch 64, linear with warm-up, bfloat16."""
    config.rounds = 4
    config.model.update(compute_dtype="bfloat16", remat="full", logits_chunk=128)
    config.export_dtype = "bfloat16"
    config.train.update(epochs=2, batch_size=64, optimizer="rmsprop", learning_rate=5e-7, schedule="linear", warmup=0.1)
    config.sampling.update(temperature=1.0, top_p=1.0, slots=256)
    config.scoring.update(batch_size=64)
    if "tolerance" in config.loss:
        config.loss.tolerance = 1e-3  # bfloat16 rounds log-probabilities of long answers that much


def gsm8k(config: ConfigDict) -> None:
    """GSM8K's 7,473 training problems on Qwen2.5-1.5B, which is fine-tuned on them first (choice: 3 epochs at 1e-5)."""
    _papers(config)
    config.model.path = "Qwen/Qwen2.5-1.5B"
    config.data.update(
        source="openai/gsm8k:main", test="openai/gsm8k:main", test_examples=1319, validation_examples=200,
        template="chat", max_prompt_tokens=256, max_response_tokens=384,
    )  # fmt: skip
    config.sft.update(epochs=3, batch_size=64, learning_rate=1e-5, schedule="linear", warmup=0.1)
    config.sampling.max_new_tokens = 384
    config.evaluation.update(run="greedy,sampled:300,likelihood,wins:300,gsm8k,gsm8k_zero", samples_per_prompt=1)


def ultrachat(config: ConfigDict, path: str, template: str = "chat") -> None:
    """First turns of 50,000 UltraChat dialogues on a model that was fine-tuned on UltraChat."""
    _papers(config)
    config.model.path = path
    config.data.update(
        source=ULTRACHAT, split="train_sft", turns="first", examples=50_000, test=ULTRACHAT, test_split="test_sft",
        test_examples=1000, validation_examples=500, template=template, max_prompt_tokens=1024,
        max_response_tokens=1024, overlong="truncate", on_bad_record="skip",
    )  # fmt: skip
    config.sampling.max_new_tokens = 256  # as the official SPIN code
    config.evaluation.update(run="likelihood,wins:500", every=1)


def sft_path(name: str) -> str:
    """Where the SFT preset of the same name leaves the model that play starts from."""
    return f"runs/sft-{name}/hf/final"
