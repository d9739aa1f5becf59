"""The decoder's Flax NNX modules: layers stacked on a leading axis and scanned."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from selfplay_jax import partitioning
from selfplay_jax.models import attention, lora, splash
from selfplay_jax.models.config import Lora, ModelConfig

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

_NORMAL = jax.nn.initializers.normal(0.02)
_ZEROS = jax.nn.initializers.zeros
_ONES = jax.nn.initializers.ones

# What of a layer is kept for the backward pass; never the gathered weights, which would be the whole model.
_SAVED = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(partitioning.UNSHARDED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(splash.SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_POLICIES = tuple(_SAVED)


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
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any,
        dtype: Any,
        remat: str,
        adapters: Lora | None,
        attention: str,
    ):
        self.config, self.dtype, self.remat, self.attention = config, dtype, remat, attention
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
