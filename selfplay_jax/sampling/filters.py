"""Turning logits into a next token: temperature, top-k, top-p, greedy."""

import dataclasses

import jax
import jax.numpy as jnp

_OUT = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingFilter:
    """How a token is drawn. Hashable: a jitted loop is compiled once for each.

    temperature: 0 is greedy (the others are then unused). top_k: 0 keeps all. top_p: 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Draws one token a row: logits [B, V] float32, keys [B] (typed PRNG keys) -> int32 [B]."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = keep_top_p(keep_top_k(logits / self.temperature, self.top_k), self.top_p)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Leaves the k largest of each row of [B, V] (ties with the k-th included); k = 0 or k >= V leaves all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < smallest, _OUT, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Leaves the smallest set of tokens whose probability reaches p (the likeliest token always); p = 1 leaves all."""
    if p >= 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    smallest = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, _OUT, logits)
