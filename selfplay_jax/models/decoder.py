"""One decoder for Llama, Qwen2 and Mistral: rows, groups that share a prompt, and decoding, over the modules' layers.

`Model` is the handle that the rest of the package holds: hashable, without arrays. Parameters travel beside it as a
plain nested dict, so that losses, Orbax and the sharding table see a tree and never a module.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.models import attention, lora, splash
from selfplay_jax.models.config import Lora, ModelConfig
from selfplay_jax.models.modules import REMAT_POLICIES, Block, Decoder

Params = dict[str, Any]

CACHE_AXES = ("layers", "batch", "act_kv_heads", "cache_columns", None)


class KVCache(NamedTuple):
    """Keys (already rotated) and values of past tokens, both [layers, batch, kv_heads, columns, head_dim]."""

    key: jax.Array
    value: jax.Array


def _near(mask: jax.Array, distance: jax.Array, window: jax.Array | None) -> jax.Array:
    """Narrows `mask` to keys less than `window` positions behind the query."""
    return mask if window is None else mask & (distance < window)


def causal_rows(
    decoder: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    kept: Any = None,
    keep: Callable[[Any, jax.Array, jax.Array, jax.Array], Any] | None = None,
) -> tuple[jax.Array, Any]:
    """Rows of tokens [B, T] (int32, right-padded to `lengths` [B]) -> final hidden states [B, T, D].

    For decoding to go on from there, `keep(kept, layer, key, value) -> kept` sees each layer's keys and values
    [B, KV, T, Hd] in turn; what it made of `kept` comes back beside the hidden states.
    """
    fast = splash.layout(decoder.attention, decoder.config, tokens.shape[1])
    column = jnp.arange(tokens.shape[1])
    distance = column[:, None] - column[None, :]
    mask = (distance >= 0)[None] & (column[None, None, :] < lengths[:, None, None])
    positions = jnp.broadcast_to(column[None], tokens.shape)

    def layer(block: Block, carry: tuple[jax.Array, Any], inputs: Any) -> tuple[Any, None]:
        x, kept = carry
        index, window = inputs
        query, key, value = block.project(x, positions)
        if fast is not None:  # padding stands right of what is real, so that being causal hides it
            attended = splash.attend(query, key, value, None, fast)
        else:
            attended = attention.attend_rows(query, key, value, _near(mask, distance[None], window))
        x = block.finish(x, attended)
        if keep is not None:
            kept = keep(kept, index, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        return (x, kept), None

    carry = (decoder.lookup(tokens), kept)
    (x, kept), _ = decoder.scan(layer, carry, jnp.arange(decoder.config.num_layers))
    return decoder.final_norm(x), kept


def group_hidden(decoder: Decoder, prompt: jax.Array, prompt_lengths: jax.Array, responses: jax.Array) -> jax.Array:
    """Hidden states that predict the tokens of K responses to each prompt; the prompt's layers run once.

    prompt [B, P] and responses [B, K, R] int32, right-padded; prompt_lengths [B]. Returns [B, K, R, D]: entry r is the
    state after the prompt and the first r response tokens. The prompt's last token is the first input of every response
    stream and the response's last token is never an input, so R states predict exactly R tokens.
    """
    length, columns = responses.shape[2], prompt.shape[1]
    context = prompt_lengths - 1
    last = jnp.take_along_axis(prompt, context[:, None], axis=1)
    first = jnp.broadcast_to(last[:, :, None], (*responses.shape[:2], 1))
    inputs = jnp.concatenate([first, responses[:, :, :-1]], axis=-1)
    fast = splash.layout(decoder.attention, decoder.config, columns, *responses.shape[1:])
    if fast is not None:
        return splash.group_hidden(decoder, prompt, context, inputs, fast)

    prompt_column, own = jnp.arange(columns), jnp.arange(length)
    prompt_distance = prompt_column[:, None] - prompt_column[None, :]
    in_context = prompt_column[None, :] < context[:, None]
    prompt_mask = (prompt_distance >= 0)[None] & in_context[:, None, :]
    own_distance = own[:, None] - own[None, :]
    own_mask = (own_distance >= 0)[None, None]
    # Response input r stands at position context + r, key p of the prompt at p.
    back = (context[:, None, None] + own[None, :, None] - prompt_column[None, None, :])[:, None]
    back_mask = jnp.broadcast_to(in_context[:, None, None, :], back.shape)
    prompt_positions = jnp.broadcast_to(prompt_column[None], prompt.shape)
    positions = jnp.broadcast_to((context[:, None] + own[None, :])[:, None, :], inputs.shape)

    def layer(block: Block, streams: tuple[jax.Array, jax.Array], extra: Any) -> tuple[Any, None]:
        p, x = streams
        window = extra[1]
        p_query, p_key, p_value = block.project(p, prompt_positions)
        query, key, value = block.project(x, positions)
        attended = attention.attend_responses(
            query, p_key, p_value, key, value,
            _near(back_mask, back, window),
            _near(own_mask, own_distance[None, None], window),
        )  # fmt: skip
        x = block.finish(x, attended)
        p_visible = _near(prompt_mask, prompt_distance[None], window)
        p = block.finish(p, attention.attend_rows(p_query, p_key, p_value, p_visible))
        return (p, x), None

    (_, x), _ = decoder.scan(layer, (decoder.lookup(prompt), decoder.lookup(inputs)))
    return decoder.final_norm(x)


def decode_step(
    decoder: Decoder, tokens: jax.Array, positions: jax.Array, column: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """One token for each of B slots: final hidden states [B, D] and the cache with the token's keys and values.

    tokens and positions [B]. The cache is a ring: every slot writes at the one `column` (a scalar), and key c of a
    slot is `(column - c) mod S` tokens old, so a slot sees the `positions + 1` newest columns. One common column
    keeps the write a dynamic slice; slots that started at other times only differ in how far back they may look.
    """
    size = cache.key.shape[3]
    age = (column - jnp.arange(size)) % size
    mask = age[None, :] <= positions[:, None]

    def layer(block: Block, carry: tuple[jax.Array, KVCache], extra: Any) -> tuple[Any, None]:
        x, cache = carry
        index, window = extra
        query, key, value = block.project(x[:, None], positions[:, None])
        cache = jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice(
                whole, jnp.swapaxes(new, 1, 2)[None].astype(whole.dtype), (index, 0, 0, column, 0)
            ),
            cache,
            KVCache(key, value),
        )
        here = jax.tree.map(lambda whole: jax.lax.dynamic_index_in_dim(whole, index, keepdims=False), cache)
        visible = _near(mask, age[None], window)
        x = block.finish(x, attention.attend_cache(query[:, 0], here.key, here.value, visible))
        return (x, cache), None

    carry = (decoder.lookup(tokens), cache)
    (x, cache), _ = decoder.scan(layer, carry, jnp.arange(decoder.config.num_layers))
    return decoder.final_norm(x), cache


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: hashable, cheap, closed over by jitted functions.

    compute_dtype: dtype of activations and of the weights as they are used. param_dtype: dtype of the stored weights.
    remat: "none", "dots" (keep matrix products) or "full" (keep only each layer's input).
    logits_chunk: response positions whose logits exist at one time (see `logprobs`).
    lora: low-rank adapters on the projections, which then are all that is trained; None trains every parameter.
    attention: "plain", "splash" (the TPU's kernel, where it serves) or "splash_interpret" (the same anywhere, slowly).
    """

    config: ModelConfig
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    logits_chunk: int = 32
    lora: Lora | None = None
    attention: str = "plain"

    def __post_init__(self) -> None:
        if self.attention not in splash.KINDS:
            raise ValueError(f"attention must be one of {', '.join(splash.KINDS)}, not {self.attention!r}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, not {self.remat!r}")

    def _create(self, key: jax.Array) -> Decoder:
        return Decoder(
            self.config,
            rngs=nnx.Rngs(params=key),
            param_dtype=jnp.dtype(self.param_dtype),
            dtype=jnp.dtype(self.compute_dtype),
            remat=self.remat,
            adapters=self.lora,
            attention=self.attention,
        )

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._create(jax.random.key(0))))

    def init(self, key: jax.Array) -> Params:
        """Random parameters: normal with standard deviation 0.02, norms one, biases zero."""
        return nnx.to_pure_dict(nnx.state(self._create(key)))

    def abstract_params(self) -> Params:
        """The parameter tree as ShapeDtypeStructs."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(self._abstract[1]))

    def logical_axes(self) -> Params:
        """The parameter tree with a tuple of logical axis names (see `partitioning.RULES`) at each leaf."""
        axes = jax.tree.map(
            lambda variable: variable.get_metadata("logical_axes"),
            self._abstract[1],
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return nnx.to_pure_dict(axes)

    def shardings(self, mesh: Mesh, rules: partitioning.Rules = partitioning.RULES) -> Params:
        """Where the parameters lie on `mesh` by `rules`: for training and scoring by default."""
        return partitioning.tree_shardings(self.logical_axes(), self.abstract_params(), mesh, rules)

    def row_specs(self, mesh: Mesh, rules: partitioning.Rules = partitioning.RULES) -> Params:
        """How parameters that lie by `rules` enter `partitioning.over_rows`."""
        return partitioning.over_rows_specs(self.logical_axes(), self.abstract_params(), mesh, rules)

    def split(self, tree: Params) -> tuple[Params, Params]:
        """A tree like the parameters as (what is trained, what is frozen): (everything, {}) without LoRA."""
        return (tree, {}) if self.lora is None else lora.split(tree)

    def join(self, trained: Params, frozen: Params) -> Params:
        """Undoes `split`."""
        return lora.join(trained, frozen)

    def in_compute_dtype(self, params: Params) -> tuple["Model", Params]:
        """The same model with its weights stored as they are used, for reading alone: equal results, less memory."""
        if self.param_dtype == self.compute_dtype:
            return self, params
        model = dataclasses.replace(self, param_dtype=self.compute_dtype)
        return model, _cast(jnp.dtype(self.compute_dtype), params)

    def bind(self, params: Params) -> Decoder:
        """The Flax module with `params` inside; use it within one jitted function."""
        graph, state = self._abstract
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def logits(self, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Plain causal logits [B, T, V], float32, of right-padded rows; for tests and evaluation of short inputs."""
        decoder = self.bind(params)
        hidden, _ = causal_rows(decoder, tokens, lengths)
        return jnp.matmul(hidden, decoder.output_matrix(), preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _cast(dtype: Any, tree: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
