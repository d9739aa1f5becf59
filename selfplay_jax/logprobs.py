"""Log-probabilities of a group's responses under one parameter tree: the one function for training and scoring."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.groups import Group, response_mask
from selfplay_jax.models.decoder import Model, Params, group_hidden


def _chunk(length: int, limit: int) -> int:
    """The largest divisor of `length` that is at most `limit`."""
    return max(size for size in range(1, min(length, limit) + 1) if length % size == 0)


def _score(weights: jax.Array, hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of `tokens` [B, K, C] and the logits [B, K, C, V] that they come from, both float32."""
    logits = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)
    logits = partitioning.constrain(logits, "batch", None, None, "act_vocab")
    # A masked sum instead of a gather: it stays local where the vocabulary is cut over devices.
    vocabulary = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(vocabulary == tokens[..., None], logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits


def _logp(weights: jax.Array, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    return _score(weights, hidden, tokens)[0]


def _logp_and_greedy(weights: jax.Array, hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    logps, logits = _score(weights, hidden, tokens)
    return logps, jnp.argmax(logits, axis=-1) == tokens


def _by_token(model: Model, params: Params, group: Group, measure: Callable[..., Any]) -> Any:
    """`measure(weights, hidden, tokens)` of all response tokens, chunk by chunk: arrays [B, K, R].

    The output projection and its log-softmax run over chunks of `model.logits_chunk` positions and are recomputed in
    the backward pass, so logits [B, K, R, V] never exist at once.
    """
    decoder = model.bind(params)
    hidden = group_hidden(decoder, group.prompt, group.prompt_lengths, group.responses)
    weights = decoder.output_matrix()
    batch, count, length, _ = hidden.shape
    chunk = _chunk(length, model.logits_chunk)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, count, length // chunk, chunk, *x.shape[3:]), 2, 0)

    measured = jax.checkpoint(measure)

    def step(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, Any]:
        return None, measured(weights, *chunk)

    _, values = jax.lax.scan(step, None, (split(hidden), split(group.responses)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, count, length), values)


def by_rows(model: Model, mesh: Mesh, measure: Callable[[Model, Params, Group], Any]) -> Callable[..., Any]:
    """`measure` jitted for parameters and rows that lie on `mesh`: (params, group) -> arrays [B, ...], on every device.

    They are few numbers, and every process reads all of them.
    """
    specs, rows = model.row_specs(mesh), partitioning.rows(mesh)
    return jax.jit(
        partitioning.over_rows(functools.partial(measure, model), mesh, (specs, rows.spec), rows.spec),
        in_shardings=(model.shardings(mesh), rows),
        out_shardings=partitioning.replicated(mesh),
    )


def token_logps(model: Model, params: Params, group: Group) -> jax.Array:
    """log π(response token | prompt, earlier tokens), float32 [B, K, R]; 0 at padding."""
    return jnp.where(response_mask(group), _by_token(model, params, group, _logp), 0.0)


def response_logps(model: Model, params: Params, group: Group) -> jax.Array:
    """log π(response | prompt), the sum over the response's tokens, float32 [B, K] (0 for an empty response)."""
    return jnp.sum(token_logps(model, params, group), axis=-1)


def greedy_logps(model: Model, params: Params, group: Group) -> tuple[jax.Array, jax.Array]:
    """`response_logps` [B, K], and whether greedy decoding would write the response: bool [B, K].

    Greedy means that each token has the largest logit given those before it (the first of equals); an empty response
    is greedy. For evaluation: training and scoring do not pay for the argmax.
    """
    logps, greedy = _by_token(model, params, group, _logp_and_greedy)
    mask = response_mask(group)
    return jnp.sum(jnp.where(mask, logps, 0.0), axis=-1), jnp.all(greedy | ~mask, axis=-1)
