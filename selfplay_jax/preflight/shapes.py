"""Where the shape of a model comes from: preflight reads no weights, and the presets' models need not be there.

The sizes below are facts about published models, written down by us; a directory's config.json always goes first.
"""

import pathlib
from typing import Any

from selfplay_jax import stores
from selfplay_jax.data import builtin
from selfplay_jax.errors import UserError
from selfplay_jax.models import ModelConfig, RopeScaling, read_config

_LLAMA_3_1 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
_LLAMA_STOPS = (128001, 128008, 128009)


def _llama(hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=128256, hidden_size=hidden, intermediate_size=mlp, num_layers=layers,
        num_heads=heads, num_kv_heads=8, head_dim=128, rope_theta=500_000.0, rope_scaling=_LLAMA_3_1, rms_norm_eps=1e-5,
        max_position_embeddings=131072, bos_id=128000, stop_ids=_LLAMA_STOPS,
    )  # fmt: skip


# By the name that people use for the model; instruction-tuned and fine-tuned versions have the same shape.
SHAPES = {
    "qwen2.5-1.5b": ModelConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, rope_theta=1_000_000.0, tie_embeddings=True, qkv_bias=True,
        max_position_embeddings=131072, stop_ids=(151643, 151645),
    ),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "mistral-7b": ModelConfig(
        family="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, sliding_window=4096, max_position_embeddings=32768,
        bos_id=1, stop_ids=(2,),
    ),
}  # fmt: skip
_SAME_SHAPE = {"zephyr-7b": "mistral-7b"}


def find(config: Any, model: str = "") -> tuple[ModelConfig, str]:
    """The shape of the model to compile, and in words where it came from.

    Args:
      config: the run's config.
      model: what --model said: a directory with a config.json, a hub name, or a name of `SHAPES`; "" asks the config.
    Raises:
      UserError: it can be found nowhere; the sentence says what to give.
    """
    path = model or config.model.path
    if path == "builtin":
        return read_config(builtin.BASE), "the built-in base"
    if stores.is_remote(path) or pathlib.Path(path).expanduser().is_dir():
        return read_config(path), f"{path}/config.json"
    name = known(path)
    if name is not None:
        return SHAPES[name], f"the sizes of {name} that preflight knows ({path} is not here)"
    if path.count("/") == 1 and not path.startswith((".", "/", "~", "runs/")):
        return read_config(path), f"config.json of {path} on the Hugging Face Hub"
    raise UserError(
        f"preflight needs the shape of the model {path}, which is not here: give --model=DIR with its config.json, or "
        f"--model= one of {', '.join(SHAPES)}."
    )


def known(path: str) -> str | None:
    """The name of `SHAPES` that a path or hub name speaks of: runs/sft-ultrachat_llama3.1_8b/hf/final, say."""
    plain = _plain(path)
    names = {_plain(name): name for name in SHAPES} | {_plain(name): same for name, same in _SAME_SHAPE.items()}
    found = [name for key, name in names.items() if key in plain]
    return found[0] if found else None


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")
