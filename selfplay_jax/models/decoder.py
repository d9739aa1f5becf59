"""One decoder for Llama, Qwen2 and Mistral: Flax NNX modules whose layers are stacked on a leading axis and scanned.

`Model` is the handle that the rest of the package holds: hashable, without arrays. Parameters travel beside it as a
plain nested dict, so that losses, Orbax and the sharding table see a tree and never a module.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from selfplay_jax import partitioning
from selfplay_jax.models import attention, lora
from selfplay_jax.models.config import Lora, ModelConfig

Params = dict[str, Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

_NORMAL = jax.nn.initializers.normal(0.02)
_ZEROS = jax.nn.initializers.zeros
_ONES = jax.nn.initializers.ones

# What of a layer is kept for the backward pass; never the gathered weights, which would be the whole model.
_SAVED = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(partitioning.UNSHARDED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_POLICIES = tuple(_SAVED)


CACHE_AXES = ("layers", "batch", "act_kv_heads", "cache_columns", None)


class KVCache(NamedTuple):
    """Keys (already rotated) and values of past tokens, both [layers, batch, kv_heads, columns, head_dim]."""

    key: jax.Array
    value: jax.Array


def _param(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: partitioning.Axes, dtype: Any) -> nnx.Param:
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=axes)


class Projection(nnx.Module):
    """A stacked linear map: kernel [L, *inputs, *outputs] and, where the family has one, bias [L, *outputs].

    With `adapters` of rank r also lora_a [L, *inputs, r] and lora_b [L, r, *outputs], float32: x -> x W + s (x A) B.
    """

    def __init__(
        self,
        layers: int,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        use_bias: bool,
        adapters: Lora | None,
        rngs: nnx.Rngs,
        param_dtype: Any,
        dtype: Any,
    ):
        self.dtype, self.adapters = dtype, adapters
        self.input_rank = len(inputs)
        shape, axes = (layers, *inputs.values(), *outputs.values()), ("layers", *inputs, *outputs)
        self.kernel = _param(rngs, _NORMAL, shape, axes, param_dtype)
        if use_bias:
            self.bias = _param(rngs, _ZEROS, (layers, *outputs.values()), ("layers", *outputs), param_dtype)
        if adapters is not None:
            # As peft: A uniform in ±1/sqrt(inputs), B zero, so that the adapted model starts as the base.
            bound = math.prod(inputs.values()) ** -0.5
            uniform, rank = lora.centred_uniform(bound), adapters.rank
            self.lora_a = _param(
                rngs, uniform, (layers, *inputs.values(), rank), ("layers", *inputs, None), jnp.float32
            )
            self.lora_b = _param(
                rngs, _ZEROS, (layers, rank, *outputs.values()), ("layers", None, *outputs), jnp.float32
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contracts the last `len(inputs)` dimensions of x. Called inside the layer scan, where L is gone."""
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.tensordot(x, kernel, axes=self.input_rank)
        if hasattr(self, "bias"):
            bias = self.bias[...].astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        if self.adapters is not None:
            narrow = jnp.tensordot(x, self.lora_a[...].astype(self.dtype), axes=self.input_rank)
            y = y + self.adapters.scale * jnp.tensordot(narrow, self.lora_b[...].astype(self.dtype), axes=1)
        return y


class RMSNorm(nnx.Module):
    """Root-mean-square norm, in float32 whatever the compute dtype; `stack` is (L,) for the norms inside the layers."""

    def __init__(self, stack: tuple[int, ...], size: int, eps: float, *, rngs: nnx.Rngs, param_dtype: Any):
        self.eps = eps
        names: partitioning.Axes = ("layers", "norm") if stack else ("norm",)
        self.scale = _param(rngs, _ONES, (*stack, size), names, param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x.dtype)
        return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Block(nnx.Module):
    """One layer's weights (all layers' outside the scan) and its pieces; the callers below compose them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any, dtype: Any, adapters: Lora | None):
        self.config = config
        self.frequencies = tuple(attention.rope_frequencies(config).tolist())
        layers, embed = config.num_layers, {"embed": config.hidden_size}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        mlp = {"mlp": config.intermediate_size}

        def linear(name: str, inputs: dict[str, int], outputs: dict[str, int], use_bias: bool) -> Projection:
            adapted = adapters if adapters is not None and name in adapters.targets else None
            return Projection(
                layers, inputs, outputs,
                use_bias=use_bias, adapters=adapted, rngs=rngs, param_dtype=param_dtype, dtype=dtype,
            )  # fmt: skip

        norm = functools.partial(
            RMSNorm, (layers,), config.hidden_size, config.rms_norm_eps, rngs=rngs, param_dtype=param_dtype
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.q = linear("q", embed, heads, config.qkv_bias)
        self.k = linear("k", embed, kv, config.qkv_bias)
        self.v = linear("v", embed, kv, config.qkv_bias)
        self.o = linear("o", heads, embed, config.out_bias)
        self.gate = linear("gate", embed, mlp, config.mlp_bias)
        self.up = linear("up", embed, mlp, config.mlp_bias)
        self.down = linear("down", mlp, embed, config.mlp_bias)

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., T, D] -> rotated queries [..., T, H, Hd], rotated keys and values [..., T, KV, Hd]."""
        normed = self.attn_norm(x)
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        query = attention.rotate(self.q(normed), positions, frequencies)
        key = attention.rotate(self.k(normed), positions, frequencies)
        return query, key, self.v(normed)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention's output and the MLP to the residual stream x [..., D]."""
        x = x + self.o(attended)
        normed = self.mlp_norm(x)
        hidden = jax.nn.silu(self.gate(normed)) * self.up(normed)
        hidden = partitioning.constrain(hidden, "batch", *([None] * (hidden.ndim - 2)), "act_mlp")
        return partitioning.constrain(x + self.down(hidden), "batch", *([None] * (x.ndim - 1)))


class Embedding(nnx.Module):
    """The token table, [V, D]; also the output projection of a tied model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = _param(rngs, _NORMAL, shape, ("vocab", "embed"), param_dtype)


class Head(nnx.Module):
    """The output projection of an untied model, [D, V]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = _param(rngs, _NORMAL, shape, ("embed", "vocab"), param_dtype)


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and output projection."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any, dtype: Any, remat: str, adapters: Lora | None
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        self.embed = Embedding(config, rngs=rngs, param_dtype=param_dtype)
        self.layers = Block(config, rngs=rngs, param_dtype=param_dtype, dtype=dtype, adapters=adapters)
        self.final_norm = RMSNorm((), config.hidden_size, config.rms_norm_eps, rngs=rngs, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = Head(config, rngs=rngs, param_dtype=param_dtype)

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, ...] -> embeddings [B, ..., D] in the compute dtype."""
        x = partitioning.lookup(self.embed.embedding[...], tokens, self.config.hidden_size, self.dtype)
        return partitioning.constrain(x, "batch", *([None] * tokens.ndim))

    def output_matrix(self) -> jax.Array:
        """The output projection [D, V] in the compute dtype: the head, or the embedding transposed where tied."""
        if self.config.tie_embeddings:
            return self._whole(self.embed.embedding).astype(self.dtype).T
        return self._whole(self.head.kernel).astype(self.dtype)

    def _whole(self, param: nnx.Variable, *, stacked: bool = False) -> jax.Array:
        names = param.get_metadata("logical_axes")[stacked:]
        return partitioning.unshard(param[...], names, {"embed": self.config.hidden_size}, self.dtype)

    def scan(self, body: Callable[[Block, Any, Any], tuple[Any, Any]], carry: Any, xs: Any = None) -> tuple[Any, Any]:
        """Runs `body(block, carry, (x, window)) -> (carry, y)` over the layers, rematerialised as `remat` says.

        `window` is the layer's sliding window (an int32 scalar), None for models without one.
        """
        graph, stacked = nnx.split(self.layers)

        def step(carry: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            weights, x, window = inputs
            # Here, not where they are used: both streams share a layer's gathered weights, and their gradients' sum.
            whole = jax.tree.map(lambda p: p.replace(self._whole(p, stacked=True)), weights, is_leaf=_is_param)
            return body(nnx.merge(graph, whole), carry, (x, window))

        step = jax.checkpoint(step, prevent_cse=False, policy=_SAVED[self.remat])
        return jax.lax.scan(step, carry, (stacked, xs, self._windows()))

    def _windows(self) -> jax.Array | None:
        if self.config.sliding_window is None:
            return None
        unlimited = jnp.iinfo(jnp.int32).max
        layer = jnp.arange(self.config.num_layers)
        limited = layer >= self.config.sliding_window_from_layer
        return jnp.where(limited, jnp.int32(self.config.sliding_window), jnp.int32(unlimited))


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


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
    column = jnp.arange(tokens.shape[1])
    distance = column[:, None] - column[None, :]
    mask = (distance >= 0)[None] & (column[None, None, :] < lengths[:, None, None])
    positions = jnp.broadcast_to(column[None], tokens.shape)

    def layer(block: Block, carry: tuple[jax.Array, Any], inputs: Any) -> tuple[Any, None]:
        x, kept = carry
        index, window = inputs
        query, key, value = block.project(x, positions)
        visible = _near(mask, distance[None], window)
        x = block.finish(x, attention.attend_rows(query, key, value, visible))
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
    """

    config: ModelConfig
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    logits_chunk: int = 32
    lora: Lora | None = None

    def __post_init__(self) -> None:
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

    def split(self, tree: Params) -> tuple[Params, Params]:
        """A tree like the parameters as (what is trained, what is frozen): (everything, {}) without LoRA."""
        return (tree, {}) if self.lora is None else lora.split(tree)

    def join(self, trained: Params, frozen: Params) -> Params:
        """Undoes `split`."""
        return lora.join(trained, frozen)

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
