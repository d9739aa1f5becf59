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


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)


def attend_rows(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of every row to itself.

    query [B, T, H, D], key and value [B, S, KV, D], mask [B, T, S] -> [B, T, H, D].
    """
    grouped = _group_queries(query, key.shape[2])
    scores = jnp.einsum("btngd,bsnd->bngts", grouped, key, preferred_element_type=jnp.float32)
    weights = _softmax(scores, mask[:, None, None]).astype(value.dtype)
    return jnp.einsum("bngts,bsnd->btngd", weights, value).reshape(query.shape)


def attend_responses(
    query: jax.Array,
    prompt_key: jax.Array,
    prompt_value: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prompt_mask: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Attention of K responses to the one prompt they share and each to itself.

    query [B, K, R, H, D]; prompt_key/value [B, P, KV, D]; key/value [B, K, R, KV, D]; prompt_mask broadcastable to
    [B, K, R, P]; mask broadcastable to [B, K, R, R] -> [B, K, R, H, D]. One softmax runs over both sets of keys.
    """
    grouped = _group_queries(query, key.shape[3])
    to_prompt = jnp.einsum("bkrngd,bpnd->bkngrp", grouped, prompt_key, preferred_element_type=jnp.float32)
    to_self = jnp.einsum("bkrngd,bksnd->bkngrs", grouped, key, preferred_element_type=jnp.float32)
    batch, count, length, prompt_length = *query.shape[:3], prompt_key.shape[1]
    both = jnp.concatenate(
        [
            jnp.broadcast_to(prompt_mask, (batch, count, length, prompt_length)),
            jnp.broadcast_to(mask, (batch, count, length, length)),
        ],
        axis=-1,
    )
    weights = _softmax(jnp.concatenate([to_prompt, to_self], axis=-1), both[:, :, None, None]).astype(value.dtype)
    from_prompt = jnp.einsum("bkngrp,bpnd->bkrngd", weights[..., :prompt_length], prompt_value)
    from_self = jnp.einsum("bkngrs,bksnd->bkrngd", weights[..., prompt_length:], value)
    return (from_prompt + from_self).reshape(query.shape)


def attend_cache(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """One decode step: query [B, H, D], cached key and value [B, KV, S, D], mask [B, S] -> [B, H, D]."""
    grouped = _group_queries(query, key.shape[1])
    scores = jnp.einsum("bngd,bnsd->bngs", grouped, key, preferred_element_type=jnp.float32)
    weights = _softmax(scores, mask[:, None, None]).astype(value.dtype)
    return jnp.einsum("bngs,bnsd->bngd", weights, value).reshape(query.shape)
