"""Tiny decoders with loud weights, and the same forward pass in NumPy float64, one row at a time."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.decoder import Model, Params

VOCAB = 40

PLAIN = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=50.0,  # fast rotations: a position that is off by one shows
)
# Biases and tied embeddings as in Qwen2, a window that is shorter than the rows, but not in the first layer.
WINDOWED = dataclasses.replace(
    PLAIN,
    family="qwen2",
    num_layers=3,
    qkv_bias=True,
    tie_embeddings=True,
    sliding_window=5,
    sliding_window_from_layer=1,
)


def loud_params(model: Model, seed: int, gain: float = 1.5) -> Params:
    """Random float32 parameters of a size at which every layer, mask and position changes the logits visibly."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [entry.key for entry in path]
        normal = rng.normal(size=like.shape).astype(np.float32)
        if names[-1] == "scale":
            return 1 + 0.2 * normal
        if names[-1] == "bias":
            return 0.3 * normal
        if names[-1] == "embedding":
            return normal / 2
        inputs = like.shape[0] if names[0] == "head" else np.prod(like.shape[1 : 3 if names[1] == "o" else 2])
        return gain / np.sqrt(inputs) * normal

    params = jax.tree_util.tree_map_with_path(leaf, model.abstract_params())
    return jax.tree.map(lambda x: x.astype(np.float32), params)


def reference_logits(config: ModelConfig, params: Params, tokens: list[int]) -> np.ndarray:
    """Logits of one row without padding: float64 [T, V]."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, half = len(tokens), config.head_dim // 2
    angles = np.arange(length)[:, None] / config.rope_theta ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def linear(x: np.ndarray, weight: dict[str, np.ndarray], layer: int, axes: int = 1) -> np.ndarray:
        y = np.tensordot(x, weight["kernel"][layer], axes)
        return y + weight["bias"][layer] if "bias" in weight else y

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embed"]["embedding"][tokens]
    block = weights["layers"]
    behind = np.arange(length)[:, None] - np.arange(length)[None, :]
    for layer in range(config.num_layers):
        windowed = config.sliding_window is not None and layer >= config.sliding_window_from_layer
        visible = (behind >= 0) & (behind < (config.sliding_window if windowed else length))
        h = norm(x, block["attn_norm"]["scale"][layer])
        repeat = config.num_heads // config.num_kv_heads
        q = rotate(linear(h, block["q"], layer))
        k = rotate(linear(h, block["k"], layer)).repeat(repeat, 1)
        v = linear(h, block["v"], layer).repeat(repeat, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(config.head_dim)
        scores = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(mixed, block["o"], layer, 2)
        h = norm(x, block["mlp_norm"]["scale"][layer])
        gate = linear(h, block["gate"], layer)
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, block["up"], layer), block["down"], layer)
    head = weights["embed"]["embedding"].T if config.tie_embeddings else weights["head"]["kernel"]
    return norm(x, weights["final_norm"]["scale"]) @ head


def reference_token_logps(config: ModelConfig, params: Params, prompt: list[int], response: list[int]) -> np.ndarray:
    """log π of every response token given the prompt and what stands before it: float64 [len(response)]."""
    if not response:
        return np.zeros(0)
    logits = reference_logits(config, params, [*prompt, *response])[len(prompt) - 1 : -1]
    top = logits.max(-1, keepdims=True)
    logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logps[np.arange(len(response)), response]


def random_rows(rng: np.random.Generator, lengths: list[int], vocab: int = VOCAB) -> list[list[int]]:
    """Rows of token ids with these lengths."""
    return [rng.integers(vocab, size=length).tolist() for length in lengths]


@functools.cache
def mesh_of(*sizes: int) -> Mesh:
    """A mesh over the eight simulated devices: (fsdp, tensor) or (replica, fsdp, tensor)."""
    *replica, fsdp, tensor = sizes
    return partitioning.make_mesh(fsdp, tensor, replica=replica[0] if replica else 1)
