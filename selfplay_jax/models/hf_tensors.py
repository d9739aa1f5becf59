"""Names and layouts: which tensor of a Hugging Face file is which leaf of our parameter tree."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from selfplay_jax.models.config import ModelConfig

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of our parameters: its path in our tree, its names in a file, and the shape of a layer in each."""

    path: tuple[str, ...]
    names: tuple[str, ...]
    file_shape: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: bool
    linear: bool  # files hold [outputs, inputs], we hold [*inputs, *outputs]

    def from_file(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.linear else tensor).reshape(self.shape)

    def to_file(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The file's tensors of a leaf, in the order of `names`."""
        for name, values in zip(self.names, leaf if self.stacked else [leaf], strict=True):
            tensor = values.reshape(self.file_shape[::-1]).T if self.linear else values.reshape(self.file_shape)
            yield name, np.ascontiguousarray(tensor)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every parameter of `config`, in the order in which files are read and written."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    projections = {
        "q": ("self_attn.q_proj", (hidden,), heads, config.qkv_bias),
        "k": ("self_attn.k_proj", (hidden,), kv, config.qkv_bias),
        "v": ("self_attn.v_proj", (hidden,), kv, config.qkv_bias),
        "o": ("self_attn.o_proj", heads, (hidden,), config.out_bias),
        "gate": ("mlp.gate_proj", (hidden,), (mlp,), config.mlp_bias),
        "up": ("mlp.up_proj", (hidden,), (mlp,), config.mlp_bias),
        "down": ("mlp.down_proj", (mlp,), (hidden,), config.mlp_bias),
    }

    def names(suffix: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer}.{suffix}" for layer in range(config.num_layers))

    embedding, norm = (config.vocab_size, hidden), (hidden,)
    table = [Tensor(("embed", "embedding"), (EMBED,), embedding, embedding, False, False)]
    for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        table.append(Tensor(("layers", ours, "scale"), names(f"{theirs}.weight"), norm, norm, True, False))
    for ours, (theirs, inputs, outputs, has_bias) in projections.items():
        file_shape = (int(np.prod(outputs)), int(np.prod(inputs)))
        path = ("layers", ours)
        table.append(Tensor((*path, "kernel"), names(f"{theirs}.weight"), file_shape, (*inputs, *outputs), True, True))
        if has_bias:
            table.append(Tensor((*path, "bias"), names(f"{theirs}.bias"), file_shape[:1], outputs, True, False))
    table.append(Tensor(("final_norm", "scale"), ("model.norm.weight",), norm, norm, False, False))
    if not config.tie_embeddings:
        table.append(Tensor(("head", "kernel"), (HEAD,), embedding, embedding[::-1], False, True))
    return table
