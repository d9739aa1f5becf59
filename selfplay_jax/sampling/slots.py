"""The device side of sampling: a fixed number of slots, filled with prompts, decoded in step, refilled as they finish.

The cache is a ring that all slots write at one common column (`decoder.decode_step`). Filling a slot lays the prompt's
keys and values into the columns just behind that one, so slots that start at different times share one cheap write.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from selfplay_jax.groups import Array
from selfplay_jax.models.decoder import KVCache, Model, Params, causal_rows, decode_step
from selfplay_jax.sampling.filters import SamplingFilter


class Slots(NamedTuple):
    """The state of B slots; N = max_new_tokens, S = columns of the cache.

    cache [L, B, KV, S, Hd] twice; column: scalar, where the next step writes;
    token [B]: the next input; position [B]: where it stands in its row; keys [B]: one PRNG key a slot;
    produced [B]: tokens drawn so far; tokens [B, N]; logps [B]: their summed log-probabilities;
    busy [B]: still decoding; finished [B]: ended by a stop token.
    """

    cache: KVCache
    column: jax.Array
    token: jax.Array
    position: jax.Array
    keys: jax.Array
    produced: jax.Array
    tokens: jax.Array
    logps: jax.Array
    busy: jax.Array
    finished: jax.Array


class Refill(NamedTuple):
    """W prompts on their way into slots.

    source [B]: which of the W prompts slot b takes, -1 for none; prompts [W, P] right-padded; lengths [W];
    keys [W]: PRNG keys.
    """

    source: Array
    prompts: Array
    lengths: Array
    keys: Array


def empty(model: Model, slots: int, columns: int, max_new_tokens: int) -> Slots:
    """All slots idle. Traced under jit with the caller's output shardings, so nothing is built on one device."""
    config = model.config
    shape = (config.num_layers, slots, config.num_kv_heads, columns, config.head_dim)
    zeros = jnp.zeros(shape, model.compute_dtype)
    count = jnp.zeros(slots, jnp.int32)
    return Slots(
        cache=KVCache(zeros, zeros),
        column=jnp.int32(0),
        token=count,
        position=count,
        keys=jax.random.split(jax.random.key(0), slots),
        produced=count,
        tokens=jnp.zeros((slots, max_new_tokens), jnp.int32),
        logps=jnp.zeros(slots, jnp.float32),
        busy=jnp.zeros(slots, bool),
        finished=jnp.zeros(slots, bool),
    )


def fill(model: Model, params: Params, state: Slots, refill: Refill) -> Slots:
    """Prefills the prompts and puts them into their slots; the other slots are untouched.

    All but a prompt's last token go into the cache; the last is the slot's first input, as in `group_hidden`.
    """
    taken = refill.source >= 0
    source = jnp.maximum(refill.source, 0)
    context = (refill.lengths - 1)[source]

    size = state.cache.key.shape[3]
    age = (state.column - 1 - jnp.arange(size)) % size
    index = context[:, None] - 1 - age[None, :]
    index = jnp.clip(index, 0, refill.prompts.shape[1] - 1)

    def place(cache: jax.Array, layer: jax.Array, fresh: jax.Array) -> jax.Array:
        rows = jnp.take_along_axis(fresh[source], index[:, None, :, None].astype(jnp.int32), axis=2)
        old = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        # Columns older than the context hold a neighbour's copy; `decode_step` never lets a slot look that far back.
        new = jnp.where(taken[:, None, None, None], rows.astype(cache.dtype), old)
        return jax.lax.dynamic_update_index_in_dim(cache, new, layer, axis=0)

    def keep(cache: KVCache, layer: jax.Array, key: jax.Array, value: jax.Array) -> KVCache:
        return KVCache(place(cache.key, layer, key), place(cache.value, layer, value))

    # A layer at a time: the keys and values of all layers, laid out like the cache, would double it.
    _, cache = causal_rows(model.bind(params), refill.prompts, refill.lengths - 1, kept=state.cache, keep=keep)
    last = jnp.take_along_axis(refill.prompts, (refill.lengths - 1)[:, None], axis=1)[:, 0]
    none = jnp.zeros_like(state.produced)
    return Slots(
        cache=cache,
        column=state.column,
        token=jnp.where(taken, last[source], state.token),
        position=jnp.where(taken, context, state.position),
        keys=jnp.where(taken, refill.keys[source], state.keys),
        produced=jnp.where(taken, none, state.produced),
        tokens=jnp.where(taken[:, None], jnp.zeros_like(state.tokens), state.tokens),
        logps=jnp.where(taken, 0.0, state.logps),
        busy=state.busy | taken,
        finished=state.finished & ~taken,
    )


def decode(
    model: Model,
    choose: SamplingFilter,
    stop_ids: tuple[int, ...],
    params: Params,
    state: Slots,
    enough: jax.Array,
    budget: jax.Array | None = None,
) -> Slots:
    """Decodes until at least `enough` slots stand idle (int32 scalar; the number of slots: until all are done).

    With a `budget` (int32 scalar) at most so many tokens a slot; None is another program, which counts nothing.
    """
    decoder = model.bind(params)
    weights = decoder.output_matrix()
    slots, limit = state.tokens.shape
    size = state.cache.key.shape[3]
    column_of = jnp.arange(limit)[None, :]

    def step(state: Slots) -> Slots:
        hidden, cache = decode_step(decoder, state.token, state.position, state.column, state.cache)
        logits = jnp.matmul(hidden, weights, preferred_element_type=jnp.float32)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.produced)
        drawn = choose(logits, keys)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), drawn[:, None], axis=1)[:, 0]
        stopped = jnp.zeros(slots, bool)
        for stop in stop_ids:
            stopped = stopped | (drawn == stop)
        busy = state.busy
        write = busy[:, None] & (column_of == state.produced[:, None])
        produced = state.produced + busy
        return Slots(
            cache=cache,
            column=(state.column + 1) % size,
            token=jnp.where(busy, drawn, state.token),
            position=state.position + busy,
            keys=state.keys,
            produced=produced,
            tokens=jnp.where(write, drawn[:, None], state.tokens),
            logps=state.logps + jnp.where(busy, logp, 0.0),
            busy=busy & ~stopped & (produced < limit),
            finished=state.finished | (busy & stopped),
        )

    def unfinished(state: Slots) -> jax.Array:
        idle = slots - jnp.sum(state.busy)
        return (idle < enough) & (idle < slots)

    if budget is None:
        return jax.lax.while_loop(unfinished, step, state)
    _, state = jax.lax.while_loop(
        lambda carry: (carry[0] > 0) & unfinished(carry[1]),
        lambda carry: (carry[0] - 1, step(carry[1])),
        (budget, state),
    )
    return state
