"""Writes the golden files: tiny random models of each family and what transformers makes of them.

    python tests/golden/make_golden.py          # needs torch and transformers; overwrites tests/golden/*/

`cases` and `reference` also serve tests/test_parity.py, which compares live. Weights are large and norms and
biases random, so that a wrong mask, position, norm or bias shows in the logits.
"""

import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
LENGTHS = (24, 9, 17)
NEW_TOKENS = 64


def cases() -> dict[str, transformers.PreTrainedConfig]:
    """Configurations by name; together they use every switch that `ModelConfig` has."""
    llama, qwen2, mistral = transformers.LlamaConfig, transformers.Qwen2Config, transformers.MistralConfig
    odd_heads = {
        "head_dim": 12,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rms_norm_eps": 1e-3,
    }
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    steeper = LLAMA3_ROPE | {"factor": 32.0}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return {
        "llama_gqa_rope": llama(**COMMON | {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
        "llama_bias_head_dim": llama(**COMMON | odd_heads | {"num_key_value_heads": 4, "rope_parameters": linear}),
        "qwen2_tied": qwen2(**COMMON | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        "qwen2_window_from_layer": qwen2(**COMMON | windows),
        "mistral_window": mistral(**COMMON | {"sliding_window": 8, "head_dim": 10}),
        # As Llama-3.2: last, because a case's seed is its place.
        "llama_tied_rope32": llama(**COMMON | {"tie_word_embeddings": True, "rope_parameters": steeper}),
    }


def random_model(config: transformers.PreTrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A float32 torch model whose norms, biases and projections are far from their usual initial values."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in LENGTHS]


def reference(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """tokens [B, T] right-padded, lengths [B], logits [B, T, V] and greedy [B, NEW_TOKENS] of the model."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits
        greedy = [_greedy(model, prompt) for prompt in prompts]
    return {
        "tokens": tokens,
        "lengths": lengths,
        "logits": logits.numpy(),
        "greedy": np.array(greedy, np.int32),
    }


def _greedy(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    # The mask is given: without it generate() masks every prompt token that equals the pad token.
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def main() -> None:
    for seed, (name, config) in enumerate(cases().items()):
        directory = pathlib.Path(__file__).parent / name
        shutil.rmtree(directory, ignore_errors=True)
        model = random_model(config, seed)
        model.save_pretrained(directory)
        np.savez_compressed(directory / "expected.npz", **reference(model, random_prompts(config.vocab_size, seed)))
        print(name, sum(file.stat().st_size for file in directory.iterdir()), "bytes")


if __name__ == "__main__":
    main()
