"""config.json of every era and family, as `ModelConfig` and back, and the fields that are refused."""

import dataclasses
from typing import Any

import pytest

from selfplay_jax.errors import UserError
from selfplay_jax.models import ModelConfig, RopeScaling
from selfplay_jax.models.hf_config import config_from_hf, config_to_hf

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_configurations_as_published() -> None:
    llama = {
        **TINY,
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-05,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Model"},
    }
    config = config_from_hf(llama, {"eos_token_id": [128008, 128001, 128009], "pad_token_id": 7})
    assert config == ModelConfig(
        family="llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5, tie_embeddings=True, max_position_embeddings=131072, bos_id=128000,
        stop_ids=(128001, 128008, 128009), pad_id=7,
    )  # fmt: skip
    qwen = {**TINY, "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False,
            "sliding_window": 4096, "max_window_layers": 21, "eos_token_id": 151643}  # fmt: skip
    config = config_from_hf(qwen)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)
    assert (config.sliding_window, config.head_dim, config.stop_ids) == (None, 8, (151643,))
    assert config_from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 2}).sliding_window is None
    windowed = config_from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 1})
    assert (windowed.sliding_window, windowed.sliding_window_from_layer) == (4096, 1)
    mistral = {**TINY, "model_type": "mistral"} | {"num_key_value_heads": 2}
    assert config_from_hf(mistral).sliding_window == 4096  # transformers' default for files that say nothing
    assert config_from_hf({**mistral, "sliding_window": None}).sliding_window is None
    assert config_from_hf(TINY).num_kv_heads == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({}, {"rope_type": "default"}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "max_position_embeddings": 64,
             "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                              "high_freq_factor": 4}},
            {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
             "high_freq_factor": 4,
             "original_max_position_embeddings": 64},
        ),
    ],
)  # fmt: skip
def test_old_and_new_rope_fields_load_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    base = TINY | {"max_position_embeddings": old.get("max_position_embeddings", 2048)}
    config = config_from_hf(base | {"rope_scaling": None} | old)
    assert config == config_from_hf(base | {"rope_parameters": new})
    assert config == config_from_hf(config_to_hf(config, dtype="float32"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "model_type: 'gemma2' is not supported, only llama, qwen2, mistral are"),
        ({"model_type": None}, "model_type: missing"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: .*SequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: .*'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling: .*'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: .*'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters: .*differ between"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor: "),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: expected a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor: 0.25"),
        ({"rope_theta": "big"}, "rope_theta: expected a positive number, got 'big'"),
        ({"vocab_size": None}, "vocab_size: expected an integer of at least 1, got None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"hidden_size": 34}, "hidden_size: 34 is no multiple"),
        ({"head_dim": 9}, "head_dim: rotary embeddings need an even number"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "num_key_value_heads": 4,
             "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types: supported are 2 entries",
        ),
        (
            {"model_type": "qwen2", "num_key_value_heads": 4,
             "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: has 'sliding_attention' layers, but no sliding window",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "layer_types": ["full_attention"] * 2},
            "layer_types: a mistral model cannot mix windows",
        ),
    ],
)  # fmt: skip
def test_unsupported_configurations_are_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        config_from_hf(TINY | fields)


def test_config_that_the_family_cannot_express_is_not_exported() -> None:
    config = dataclasses.replace(config_from_hf(TINY), sliding_window=8)
    with pytest.raises(UserError, match=r"sliding_window: a llama config\.json cannot say 8"):
        config_to_hf(config, dtype="float32")
