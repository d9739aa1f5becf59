"""Attention on TPUs: a prompt and its K responses as one sequence, through JAX's splash attention kernel.

The kernel computes scores block by block in fast memory, so neither scores nor masks exist in HBM, and skips the
blocks in which nothing is seen (a response's view of the other responses). Lengths are padded up to its blocks.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from selfplay_jax import partitioning
from selfplay_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from selfplay_jax.models.modules import Block, Decoder

# "splash_interpret" runs the kernel as ordinary XLA operations, on any backend: slow, for tests.
KINDS = ("plain", "splash", "splash_interpret")

# The name under which `jax.checkpoint` policies find what the kernel's backward pass needs of its forward pass.
SAVED = "splash_attention"

# A query is one int32 to the kernel's mask: the response it belongs to above these bits, its column below.
INDEX_BITS = 20
_MAX_LENGTH, _MAX_RESPONSES = 1 << INDEX_BITS, 1 << (30 - INDEX_BITS)

_LANES = 128
_LARGEST_BLOCK = 512  # a block of float32 scores is 1 MiB; four of them and the operands fit in 16 MiB


def resolve(choice: str, platform: str) -> str:
    """`Model.attention` for a config's "auto", "plain" or "splash" and the platform that will run it ("tpu", "cpu")."""
    if choice == "auto":
        choice = "splash" if platform == "tpu" else "plain"
    return "splash_interpret" if choice == "splash" and platform != "tpu" else choice


@dataclasses.dataclass(frozen=True)
class Layout:
    """A sequence of `prompt` columns and then `count` responses of `response` columns each, seen through `window`."""

    prompt: int
    count: int = 0
    response: int = 0
    window: int | None = None
    interpret: bool = False

    @property
    def length(self) -> int:
        """Columns of the sequence."""
        return self.prompt + self.count * self.response


def layout(kind: str, config: ModelConfig, prompt: int, count: int = 0, response: int = 0) -> Layout | None:
    """How splash attention would see such a sequence; None where plain attention has to, or had better, do it.

    That is below one block (a bucket of a few tokens would be padded to 128), past 2^20 columns or 2^10 responses, and
    in models that it does not fit.
    """
    found = Layout(prompt, count, response, config.sliding_window, kind == "splash_interpret")
    served = kind != "plain" and fits(config) and _LANES <= found.length < _MAX_LENGTH and count < _MAX_RESPONSES
    return found if served else None


def fits(config: ModelConfig) -> bool:
    """Whether all layers of a model see through the same window: the kernel's mask is fixed, the layers one program."""
    return config.sliding_window is None or config.sliding_window_from_layer == 0


def block_size(length: int) -> int:
    """The kernel's block for a sequence, a multiple of 128: as large as memory allows, with little padding."""
    blocks = -(-length // _LARGEST_BLOCK)
    return -(-length // (blocks * _LANES)) * _LANES


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, shape: Layout) -> jax.Array:
    """Attention within sequences laid out as `shape`.

    query [B, S, H, D], key and value [B, S, KV, D] -> [B, S, H, D]. segments [B, S] int32: a query sees keys of its own
    segment only; None is one segment. With a mesh in scope every device computes its own rows and heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    compilers = set(mesh.axis_names) - set(mesh.manual_axes)
    local = functools.partial(_attend, shape=shape)
    if not compilers:
        return local(query, key, value, segments)
    q_spec = partitioning.compilers_spec(("batch", None, "act_heads", None), query.shape)
    kv_spec = partitioning.compilers_spec(("batch", None, "act_kv_heads", None), key.shape)
    if q_spec[2] != kv_spec[2]:  # the key/value heads do not divide: each device takes those that its queries need
        local = functools.partial(_pick_heads, query.shape[2], key.shape[2], q_spec[2], local)
    segment_spec = None if segments is None else PartitionSpec(q_spec[0])
    # No check of replication: a Pallas call cannot say over which axes its outputs vary.
    on_devices = jax.shard_map(
        local, in_specs=(q_spec, kv_spec, kv_spec, segment_spec), out_specs=q_spec,
        axis_names=compilers, check_vma=False,
    )  # fmt: skip
    return on_devices(query, key, value, segments)


def _pick_heads(heads: int, kv_heads: int, axis: Any, local: Any, query: Any, key: Any, value: Any, seg: Any) -> Any:
    """Runs `local` with whole keys and values [B, S, KV, D], but some of the query heads [B, S, H / n, D]."""
    here, group = query.shape[2], heads // kv_heads
    wanted = (jax.lax.axis_index(axis) * here + jnp.arange(here)) // group
    if group % here == 0:  # all of this device's queries share one
        wanted = wanted[:1]
    return local(query, jnp.take(key, wanted, axis=2), jnp.take(value, wanted, axis=2), seg)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, *, shape: Layout
) -> jax.Array:
    """`attend` on one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    block = block_size(shape.length)
    beyond = -shape.length % block

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, beyond), (0, 0)))

    kernel = _kernel(shape, query.shape[2], block)
    scaled = heads_first(query / math.sqrt(query.shape[3]))
    # Every query sees itself, in padding too: no softmax is over nothing, and what padding computes stays finite.
    ids = None
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, beyond)))
        ids = splash.SegmentIds(q=segments, kv=segments)
    attended = jax.vmap(kernel)(scaled, heads_first(key), heads_first(value), ids)
    return jnp.moveaxis(attended[:, :, : shape.length], 1, 2)


def _kernel(shape: Layout, heads: int, block: int) -> Any:
    """The kernel for one row: query [H, S, D], key and value [KV, S, D], segment ids -> [H, S, D]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    from selfplay_jax.models.splash_mask import GroupMask

    length = -(-shape.length // block) * block
    # Without responses the padding is more prompt.
    prompt = shape.prompt if shape.count else length
    mask = GroupMask(prompt, shape.response, shape.window, length)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha_single_device(
        mask=splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=SAVED,
        interpret=shape.interpret,
    )


def group_hidden(
    decoder: "Decoder", prompt: jax.Array, context: jax.Array, inputs: jax.Array, shape: Layout
) -> jax.Array:
    """`decoder.group_hidden` with each prompt and its responses as one sequence.

    prompt [B, P], of which the first `context` [B] tokens are seen; inputs [B, K, R]: the responses' input tokens
    -> [B, K, R, D].
    """
    batch, columns = prompt.shape
    # The context moves to the prompt's end: how far a response's token is from a prompt's then depends on columns only.
    column = jnp.arange(columns)[None, :]
    before = columns - context[:, None]
    moved = jnp.take_along_axis(prompt, (column + context[:, None]) % columns, axis=1)
    tokens = jnp.concatenate([moved, inputs.reshape(batch, -1)], axis=1)

    own = jnp.arange(shape.count * shape.response)[None, :]
    positions = jnp.concatenate([jnp.maximum(column - before, 0), context[:, None] + own % shape.response], axis=1)
    seen = jnp.pad(column >= before, ((0, 0), (0, own.size)), constant_values=True)
    segments = seen.astype(jnp.int32)

    def layer(block: "Block", x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        query, key, value = block.project(x, positions)
        return block.finish(x, attend(query, key, value, segments, shape)), None

    x, _ = decoder.scan(layer, decoder.lookup(tokens))
    return decoder.final_norm(x[:, columns:].reshape(*inputs.shape, -1))
