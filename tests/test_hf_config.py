"""config.json of every era and family, as `ModelConfig` and back, and the fields that are refused."""

import dataclasses
from typing import Any

import jax
import pytest

from selfplay_jax.errors import UserError
from selfplay_jax.models import Model, ModelConfig, RopeScaling
from selfplay_jax.models.hf_config import config_from_hf, config_to_hf
from selfplay_jax.models.hf_tensors import in_file_order, parameter_count, tensors

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
        "auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]},  # of no weight
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
        (
            {"auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Model"},
             "model_type": "mystery", "architectures": ["MysteryForCausalLM"]},
            r"auto_map: .*code in its repository \(somebody/else--modeling.Model\), which never runs.*convert it once",
        ),
        (
            {"auto_map": {"AutoConfig": "c.Config"}, "architectures": ["LlamaForCausalLM"]},
            r"auto_map: .*\(c.Config\), which never runs here; .*plain LlamaForCausalLM, delete auto_map",
        ),
        ({"auto_map": "modeling.py"}, "auto_map: expected an object, got 'modeling.py'"),
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


def _published(family: str, vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, **more: Any) -> Any:
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "hidden_act": "silu",
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "torch_dtype": "bfloat16", "use_cache": True, **more,
    }  # fmt: skip


LLAMA_3_1_8B = _published(
    "llama", 128256, 4096, 14336, 32, 32, 8,
    attention_bias=False, attention_dropout=0.0, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
    initializer_range=0.02, max_position_embeddings=131072, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5,
    rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    rope_theta=500000.0, tie_word_embeddings=False, transformers_version="4.42.3",
)  # fmt: skip
QWEN_2_5_1_5B = _published(
    "qwen2", 151936, 1536, 8960, 28, 12, 2,
    attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643, initializer_range=0.02,
    max_position_embeddings=131072, max_window_layers=28, rms_norm_eps=1e-6, rope_theta=1000000.0,
    sliding_window=131072, tie_word_embeddings=True, transformers_version="4.40.1", use_mrope=False,
    use_sliding_window=False,
)  # fmt: skip
MISTRAL_7B = _published(
    "mistral", 32000, 4096, 14336, 32, 32, 8,
    bos_token_id=1, eos_token_id=2, initializer_range=0.02, max_position_embeddings=32768, rms_norm_eps=1e-5,
    rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, transformers_version="4.34.0.dev0",
)  # fmt: skip
ZEPHYR_7B = MISTRAL_7B | {"use_cache": False, "pad_token_id": 2, "attention_dropout": 0.0}


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        (LLAMA_3_1_8B, 8_030_261_248),
        (QWEN_2_5_1_5B, 1_543_714_304),
        (MISTRAL_7B, 7_241_732_096),
        (ZEPHYR_7B, 7_241_732_096),
    ],
    ids=["llama-3.1-8b", "qwen2.5-1.5b", "mistral-7b", "zephyr-7b"],
)
def test_sizes_of_the_papers_models(published: dict[str, Any], parameters: int) -> None:
    config = config_from_hf(published)
    assert parameter_count(config) == parameters
    leaves = jax.tree.leaves(Model(config).abstract_params())
    assert sum(leaf.size for leaf in leaves) == parameters
    order = [name for name, _, _ in in_file_order(tensors(config))]
    assert len(set(order)) == len(order)
    exported = config_to_hf(config, dtype="bfloat16", source=published)
    carried = published.keys() - {"rope_scaling", "torch_dtype", "sliding_window"}
    assert {key: exported[key] for key in carried} == {key: published[key] for key in carried}


def test_fields_of_the_papers_models() -> None:
    llama, qwen, mistral, zephyr = (
        config_from_hf(published) for published in (LLAMA_3_1_8B, QWEN_2_5_1_5B, MISTRAL_7B, ZEPHYR_7B)
    )
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (llama.rope_theta, llama.head_dim, llama.stop_ids) == (5e5, 128, (128001, 128008, 128009))
    assert (qwen.tie_embeddings, qwen.qkv_bias, qwen.out_bias, qwen.sliding_window) == (True, True, False, None)
    assert (qwen.head_dim, qwen.rope_theta) == (128, 1e6)
    assert (mistral.sliding_window, mistral.sliding_window_from_layer) == (4096, 0)
    assert (mistral.pad_id, zephyr.pad_id) == (None, 2)


def test_config_that_the_family_cannot_express_is_not_exported() -> None:
    config = dataclasses.replace(config_from_hf(TINY), sliding_window=8)
    with pytest.raises(UserError, match=r"sliding_window: a llama config\.json cannot say 8"):
        config_to_hf(config, dtype="float32")
