"""config.json and generation_config.json of Hugging Face <-> `ModelConfig`.

Absent fields take the defaults of transformers' own config classes: that is what the file's author meant.
Everything the decoder cannot compute is refused by name: a wrong model must never load quietly.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from selfplay_jax.errors import UserError
from selfplay_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}

# Where the families' config classes differ. num_key_value_heads None means as many as num_attention_heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "bos_token_id": 1,
              "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
              "max_window_layers": 28},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
                "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip
_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}

# Fields of a source config.json that must not follow the weights into an export.
_NOT_CARRIED = (
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "partial_rotary_factor",
    "original_max_position_embeddings",  # outside rope_parameters it would override what is inside
)


def config_from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads the fields of a Llama, Qwen2 or Mistral config.json.

    Args:
        config: parsed config.json, of transformers 5 (`rope_parameters`, `layer_types`) or older
            (`rope_theta`, `rope_scaling`).
        generation_config: parsed generation_config.json; its ends of text are added to the config's.

    Raises:
        UserError: naming the field that is missing, malformed or asks for something the decoder does not do. An
            `auto_map` is such a field, of a supported architecture too: its author says that the model is what a
            Python file of the repository computes, and no such file is ever run, or read, here.
    """
    _refuse_remote_code(config)
    family = _family(config)
    fields = {**_COMMON, **_DEFAULTS[family], **config}
    if fields["hidden_act"] != "silu":
        raise UserError(f"hidden_act: {fields['hidden_act']!r} is not supported, only 'silu' is")
    if fields.get("quantization_config") is not None:
        raise UserError("quantization_config: quantized weights are not supported, use the unquantized model")
    num_layers = _integer(fields, "num_hidden_layers")
    num_heads = _integer(fields, "num_attention_heads")
    num_kv_heads = num_heads if fields["num_key_value_heads"] is None else _integer(fields, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise UserError(f"num_key_value_heads: {num_kv_heads} does not divide num_attention_heads {num_heads}")
    max_position = _integer(fields, "max_position_embeddings")
    rope_theta, rope_scaling = _rope(fields, max_position)
    window, window_from = _sliding_window(family, fields, num_layers)
    llama = family == "llama"
    generation = generation_config or {}
    return ModelConfig(
        family=family,
        vocab_size=_integer(fields, "vocab_size"),
        hidden_size=_integer(fields, "hidden_size"),
        intermediate_size=_integer(fields, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, num_heads),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=_number(fields, "rms_norm_eps"),
        tie_embeddings=_boolean(fields, "tie_word_embeddings"),
        qkv_bias=family == "qwen2" or (llama and _boolean(fields, "attention_bias")),
        out_bias=llama and _boolean(fields, "attention_bias"),
        mlp_bias=llama and _boolean(fields, "mlp_bias"),
        sliding_window=window,
        sliding_window_from_layer=window_from,
        max_position_embeddings=max_position,
        bos_id=_token_id(fields, generation, "bos_token_id"),
        stop_ids=tuple(dict.fromkeys(_token_ids(fields, "eos_token_id") + _token_ids(generation, "eos_token_id"))),
        pad_id=_token_id(fields, generation, "pad_token_id"),
    )


def config_to_hf(config: ModelConfig, *, dtype: str, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of a config.json that transformers 5 and older readers (such as vLLM) understand alike.

    Args:
        config: what to write.
        dtype: the type of the stored tensors, "float32" or "bfloat16".
        source: a config.json of the same family whose other fields are carried through.

    Raises:
        UserError: if the family's config.json has no field for what `config` asks for.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_max_position
    fields = {key: value for key, value in (source or {}).items() if key not in _NOT_CARRIED}
    fields |= {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling is not None else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_fields(config),
    }
    if config.family == "llama":
        fields |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    elif config.family == "mistral":
        fields["sliding_window"] = config.sliding_window
    else:
        windowed = config.sliding_window is not None
        full = config.sliding_window_from_layer if windowed else config.num_layers
        fields |= {
            "use_sliding_window": windowed,
            "sliding_window": config.sliding_window,
            "max_window_layers": full,
            "layer_types": ["full_attention"] * full + ["sliding_attention"] * (config.num_layers - full),
        }
    _check_same(config_from_hf(fields), config)
    return fields


def token_fields(config: ModelConfig) -> dict[str, Any]:
    """The special tokens as both config.json and generation_config.json spell them."""
    stop = list(config.stop_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        "pad_token_id": config.pad_id,
    }


def _refuse_remote_code(config: Mapping[str, Any]) -> None:
    """Tokenizers may have an `auto_map` entry: it concerns no weight, and transformers runs nothing unasked."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, Mapping):
        raise UserError(f"auto_map: expected an object, got {auto_map!r}")
    code = [str(value) for name, value in auto_map.items() if name.startswith(("AutoModel", "AutoConfig"))]
    if not code:
        return
    supported = ", ".join(ARCHITECTURES.values())
    architectures = [str(name) for name in config.get("architectures") or []]
    ours = [name for name in architectures if name in ARCHITECTURES.values()]
    if ours and config.get("model_type") in ARCHITECTURES:
        advice = f"if the weights are those of a plain {ours[0]}, delete auto_map from config.json"
    else:
        advice = (
            f"if its layers are those of {supported}, convert it once: rename its tensors to theirs and write a "
            "config.json with their architectures and model_type and without auto_map"
        )
    raise UserError(
        f"auto_map: the model is defined by code in its repository ({code[0]}), which never runs here; {advice}"
    )


def _family(config: Mapping[str, Any]) -> str:
    supported = ", ".join(ARCHITECTURES)
    architectures = config.get("architectures") or []
    by_architecture = {name.lower(): family for family, name in ARCHITECTURES.items()}
    found = [by_architecture[str(name).lower()] for name in architectures if str(name).lower() in by_architecture]
    if architectures and not found:
        raise UserError(
            f"architectures: {architectures} is not supported, only {', '.join(ARCHITECTURES.values())} are"
        )
    family = config.get("model_type") or (found[0] if found else None)
    if family is None:
        raise UserError(f"model_type: missing; supported are {supported}")
    if family not in ARCHITECTURES:
        raise UserError(f"model_type: {family!r} is not supported, only {supported} are")
    return str(family)


def _rope(fields: Mapping[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling; of old and new fields together the old rule, as in transformers 5."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{name}: {rope!r} is not an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{name}: rotary settings that differ between layers are not supported")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial is not None and partial != 1.0:
        raise UserError(f"partial_rotary_factor: {partial!r} is not supported, the decoder rotates whole heads")
    thetas = {"rope_theta": 10_000.0} | _present(fields, "rope_theta") | _present(rope, "rope_theta")
    theta = _number(thetas, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=_number(rope, "factor", where=name))
    if kind != "llama3":
        raise UserError(
            f"{name}: the rotary scaling 'rope_type': {kind!r} is not supported, only 'default', 'linear' "
            "and 'llama3' are"
        )
    original = {"original_max_position_embeddings": max_position, **rope}
    original |= _present(fields, "original_max_position_embeddings")
    scaling = RopeScaling(
        "llama3",
        factor=_number(rope, "factor", where=name),
        low_freq_factor=_number(rope, "low_freq_factor", where=name),
        high_freq_factor=_number(rope, "high_freq_factor", where=name),
        original_max_position=_integer(original, "original_max_position_embeddings", where=name),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{name}: high_freq_factor must be greater than low_freq_factor")
    return theta, scaling


def _sliding_window(family: str, fields: Mapping[str, Any], num_layers: int) -> tuple[int | None, int]:
    """The window's size and the first layer that has it."""
    window: int | None = None
    first = 0
    if family == "mistral" and fields["sliding_window"] is not None:
        window = _integer(fields, "sliding_window")
    used = family == "qwen2" and _boolean(fields, "use_sliding_window")
    if used and fields["sliding_window"] is not None:
        window = _integer(fields, "sliding_window")
        first = min(_integer(fields, "max_window_layers", least=0), num_layers)
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        full = list(layer_types).count("full_attention")
        expected = ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
        if list(layer_types) != expected:
            raise UserError(
                f"layer_types: supported are {num_layers} entries, first 'full_attention' and then "
                f"'sliding_attention', not {list(layer_types)}"
            )
        if full < num_layers and window is None:
            raise UserError("layer_types: has 'sliding_attention' layers, but no sliding window is in use")
        if family != "qwen2" and full != (num_layers if window is None else 0):
            raise UserError(f"layer_types: a {family} model cannot mix windows, its layers must all be alike")
        first = full
    return (None, 0) if window is None or first == num_layers else (window, first)


def _head_dim(fields: Mapping[str, Any], num_heads: int) -> int:
    hidden = _integer(fields, "hidden_size")
    if fields.get("head_dim") is None and hidden % num_heads:
        raise UserError(f"hidden_size: {hidden} is no multiple of num_attention_heads {num_heads}, give head_dim")
    head_dim = hidden // num_heads if fields.get("head_dim") is None else _integer(fields, "head_dim")
    if head_dim % 2:
        raise UserError(f"head_dim: rotary embeddings need an even number, not {head_dim}")
    return head_dim


def _present(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: fields[name]} if fields.get(name) is not None else {}


def _integer(fields: Mapping[str, Any], name: str, *, least: int = 1, where: str = "") -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}{'.' * bool(where)}{name}: expected an integer of at least {least}, got {value!r}")
    return value


def _number(fields: Mapping[str, Any], name: str, *, where: str = "") -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"{where}{'.' * bool(where)}{name}: expected a positive number, got {value!r}")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{name}: expected true or false, got {value!r}")
    return value


def _token_ids(fields: Mapping[str, Any], name: str) -> list[int]:
    value = fields.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in values):
        raise UserError(f"{name}: expected a token id or a list of token ids, got {value!r}")
    return [token for token in values if token >= 0]  # some old files spell "none" as -1


def _token_id(fields: Mapping[str, Any], generation: Mapping[str, Any], name: str) -> int | None:
    return next(iter(_token_ids(fields, name) + _token_ids(generation, name)), None)


def _check_same(written: ModelConfig, wanted: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        got, want = getattr(written, field.name), getattr(wanted, field.name)
        if got != want:
            raise UserError(f"{field.name}: a {wanted.family} config.json cannot say {want!r} (it would read {got!r})")
