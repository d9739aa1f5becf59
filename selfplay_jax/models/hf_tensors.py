"""Names and layouts: which tensor of a Hugging Face file is which leaf of our parameter tree."""

import dataclasses
import math

from selfplay_jax.models.config import ModelConfig

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of our parameters: its path in our tree, its names in a file, and the shape of a layer in each.

    A file's matrix is [outputs, inputs] with heads and head_dim merged, ours is [*inputs, *outputs]; `inputs` says how
    many of our axes are inputs (0 for what is no matrix of a linear map: norms, biases, the embedding).
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    file_shape: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: bool
    inputs: int = 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The parameter's shape, its layers included."""
        return (len(self.names), *self.shape) if self.stacked else self.shape

    @property
    def to_file(self) -> tuple[int, ...]:
        """The transposition of our axes that leaves only neighbours to merge: [*outputs, *inputs]."""
        rank = len(self.shape)
        return (*range(self.inputs, rank), *range(self.inputs))

    @property
    def from_file(self) -> tuple[int, ...]:
        """The transposition that undoes `to_file`."""
        outputs = len(self.shape) - self.inputs
        return (*range(outputs, len(self.shape)), *range(outputs))

    @property
    def split_shape(self) -> tuple[int, ...]:
        """`file_shape` with heads and head_dim apart, in the file's order of axes."""
        return tuple(self.shape[axis] for axis in self.to_file)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every parameter of `config`."""
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
    table = [Tensor(("embed", "embedding"), (EMBED,), embedding, embedding, False)]
    for ours, (theirs, inputs, outputs, has_bias) in projections.items():
        file_shape = (math.prod(outputs), math.prod(inputs))
        path, kernel = ("layers", ours), (*inputs, *outputs)
        table.append(Tensor((*path, "kernel"), names(f"{theirs}.weight"), file_shape, kernel, True, len(inputs)))
        if has_bias:
            table.append(Tensor((*path, "bias"), names(f"{theirs}.bias"), file_shape[:1], outputs, True))
    for ours, theirs in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        table.append(Tensor(("layers", ours, "scale"), names(f"{theirs}.weight"), norm, norm, True))
    table.append(Tensor(("final_norm", "scale"), ("model.norm.weight",), norm, norm, False))
    if not config.tie_embeddings:
        table.append(Tensor(("head", "kernel"), (HEAD,), embedding, embedding[::-1], False, 1))
    return table


def in_file_order(table: list[Tensor]) -> list[tuple[str, Tensor, int]]:
    """(name, parameter, layer) of every tensor, layer by layer, as transformers writes them."""
    stacked = [entry for entry in table if entry.stacked]
    first, last = [table[0]], [entry for entry in table[1:] if not entry.stacked]
    layers = range(len(stacked[0].names))
    return [
        *((entry.names[0], entry, 0) for entry in first),
        *((entry.names[layer], entry, layer) for layer in layers for entry in stacked),
        *((entry.names[0], entry, 0) for entry in last),
    ]


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters; a tied embedding counts once."""
    return sum(math.prod(entry.full_shape) for entry in tensors(config))
