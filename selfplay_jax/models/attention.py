"""Rotary positions and the three shapes of attention: rows, responses that share a prompt, and one decode step.

All are grouped-query attention with a float32 softmax. Masks are booleans, True where a query may look.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from selfplay_jax.models.config import ModelConfig

# Finite, so that a row with nothing to look at (the padding of a short batch) gives numbers instead of NaN.
_MASKED = -1e30

# Queries whose scores exist at one time.
_BLOCK = 128


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Rotation speeds per position, radians, float32 [head_dim // 2], after the config's RoPE scaling."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind != "llama3":
        raise ValueError(f"rope_scaling.kind must be 'llama3' or 'linear', not {scaling.kind!r}")
    # Llama 3.1: wavelengths shorter than original/high stay, longer than original/low are divided, between: a blend.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (frequencies * (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Applies RoPE. x [..., T, heads, head_dim], positions [..., T]; computed in float32, returned in x's dtype."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape((1,) * (positions.ndim + 1) + (-1,))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _group_queries(query: jax.Array, kv_heads: int) -> jax.Array:
    """[..., H, D] -> [..., KV, H // KV, D], scaled by 1/sqrt(D)."""
    *lead, heads, dim = query.shape
    return (query / math.sqrt(dim)).reshape(*lead, kv_heads, heads // kv_heads, dim)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Where the queries of a row are cut: scores exist for one block at a time. At most 8: programs stay small."""
    size = max(_BLOCK, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, scores, _MASKED)


def _top(scores: jax.Array) -> jax.Array:
    """The largest score of each query, a constant to the gradient: softmax does not depend on it."""
    return jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix products over the last two dimensions, summed in float32."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def attend_rows(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Causal attention of every row to itself.

    query [B, T, H, D], key and value [B, T, KV, D], mask [B or 1, T, T] (beyond the diagonal it is not looked at)
    -> [B, T, H, D].
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    # Heads before positions: plain matrix products, which CPUs compute several times faster than a permuted einsum.
    grouped = jnp.moveaxis(_group_queries(query, kv_heads), 1, 3)  # [B, KV, G, T, D]
    keys, values = jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 2)  # [B, KV, D, T], [B, KV, T, D]
    outputs = []
    for start, end in _blocks(length):
        block = grouped[..., start:end, :].reshape(batch, kv_heads, -1, dim)
        scores = _product(block, keys[..., :end]).reshape(batch, kv_heads, -1, end - start, end)
        scores = _masked(scores, mask[:, None, None, start:end, :end])
        weights = jnp.exp(scores - _top(scores))
        mixed = _product(weights.astype(value.dtype).reshape(batch, kv_heads, -1, end), values[:, :, :end])
        mixed = mixed.reshape(batch, kv_heads, -1, end - start, dim) / jnp.sum(weights, axis=-1, keepdims=True)
        outputs.append(mixed.astype(value.dtype).reshape(batch, heads, end - start, dim))
    return jnp.moveaxis(jnp.concatenate(outputs, axis=2), 2, 1)


def attend_responses(
    query: jax.Array,
    prompt_key: jax.Array,
    prompt_value: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prompt_mask: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Attention of K responses to the one prompt they share and, causally, each to itself.

    query [B, K, R, H, D]; prompt_key/value [B, P, KV, D]; key/value [B, K, R, KV, D]; prompt_mask [B, 1, R, P]; mask
    [1, 1, R, R] (beyond the diagonal it is not looked at) -> [B, K, R, H, D]. One softmax runs over both
    sets of keys.
    """
    batch, count, length, _, dim = query.shape
    kv_heads = key.shape[3]
    grouped = jnp.moveaxis(_group_queries(query, kv_heads), (1, 2), (2, 4))  # [B, KV, K, G, R, D]
    keys, values = jnp.moveaxis(key, 3, 1).swapaxes(3, 4), jnp.moveaxis(value, 3, 1)  # [B, KV, K, D, R], [.., R, D]
    prompt_keys, prompt_values = jnp.moveaxis(prompt_key, 1, 3), jnp.moveaxis(prompt_value, 1, 2)
    outputs = []
    for start, end in _blocks(length):
        block = grouped[..., start:end, :]
        shape = (*block.shape[:-1], -1)  # [B, KV, K, G, block, keys]
        to_prompt = _product(block.reshape(batch, kv_heads, -1, dim), prompt_keys).reshape(shape)
        to_self = _product(block.reshape(batch, kv_heads, count, -1, dim), keys[..., :end]).reshape(shape)
        to_prompt = _masked(to_prompt, prompt_mask[:, None, :, None, start:end])
        to_self = _masked(to_self, mask[:, None, :, None, start:end, :end])
        # One softmax over two arrays, without joining them.
        top = jnp.maximum(_top(to_prompt), _top(to_self))
        to_prompt, to_self = jnp.exp(to_prompt - top), jnp.exp(to_self - top)
        total = jnp.sum(to_prompt, axis=-1, keepdims=True) + jnp.sum(to_self, axis=-1, keepdims=True)
        to_prompt, to_self = to_prompt.astype(value.dtype), to_self.astype(value.dtype)
        from_prompt = _product(to_prompt.reshape(batch, kv_heads, -1, to_prompt.shape[-1]), prompt_values)
        from_self = _product(to_self.reshape(batch, kv_heads, count, -1, end), values[:, :, :, :end])
        mixed = (from_prompt.reshape(block.shape) + from_self.reshape(block.shape)) / total
        outputs.append(mixed.astype(value.dtype))
    return jnp.moveaxis(jnp.concatenate(outputs, axis=4), (2, 4), (1, 2)).reshape(query.shape)


def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """One decode step: query [B, H, D], cached key and value [B, KV, S, D], mask [B, S] -> [B, H, D]."""
    grouped = _group_queries(query, key.shape[1])
    scores = jnp.einsum("bngd,bnsd->bngs", grouped, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(_masked(scores, mask[:, None, None]), axis=-1).astype(value.dtype)
    return jnp.einsum("bngs,bnsd->bngd", weights, value).reshape(query.shape)
