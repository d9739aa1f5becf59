"""The mesh, and the one table that says which mesh axis a logical axis is cut over.

The mesh has three axes: `replica` copies the model (across slices: only gradients travel between them), `fsdp` cuts
parameters and batches, `tensor` cuts heads and hidden units. Parameters and activations name their axes logically
("embed", "heads", "batch", ...). `RULES` turns a logical name into mesh axes; everything else here turns tuples of
names into shardings. A dimension that its mesh axes do not divide stays whole, so every layout computes the same
numbers; `undivided` lists such dimensions.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from selfplay_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")

# logical axis -> mesh axis or axes. Names not listed are never cut.
Rules = dict[str, str | tuple[str, ...]]
RULES: Rules = {
    # parameters
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    # activations and data
    "batch": ("replica", "fsdp"),
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "cache_columns": "tensor",  # where the key/value heads are too few for it: an axis cuts an array once
}

# Decoding reads every weight for every token: with these rules each device keeps whole columns of the weights instead
# of gathering them at each step. For models that do not fit that way, `RULES` serves decoding too.
DECODE_RULES = {name: axis for name, axis in RULES.items() if name != "embed"}

Axes = tuple[str | None, ...]


def make_mesh(
    fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, *, replica: int = 1
) -> Mesh:
    """A ("replica", "fsdp", "tensor") mesh over `devices` (all by default); a size of -1 takes the devices left.

    On TPUs neighbours in the mesh are neighbours in the torus; with several slices `replica` lies across them.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `replica` does not cover the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, sizes = len(devices), [replica, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0 and count % known == 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"mesh.replica={replica}, mesh.fsdp={fsdp} and mesh.tensor={tensor} do not fit {count} device(s): their "
            f"product must be {count}, and at most one of them may be -1 for 'the rest'."
        )
    return Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """The devices as an array of `sizes`: TPUs by their place in the torus, others in their order."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"mesh.replica={sizes[0]} must be a multiple of the {slices} slices: fsdp and tensor stay within a slice."
        )
    # A torus axis may be shared by two mesh axes: fsdp 128 x tensor 2 on 16x16 has no other form.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within = [sizes[0] // slices, *sizes[1:]]
    return mesh_utils.create_hybrid_device_mesh(within, [slices, 1, 1], devices, allow_split_physical_axes=True)


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: "tpu", "gpu" or "cpu". The process may be another thing, when it only compiles."""
    return mesh.devices.flat[0].platform


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into: its size must be a multiple."""
    return _cut("batch", mesh, RULES)[1]


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading dimension is a batch."""
    return NamedSharding(mesh, row_spec(mesh))


def _cut(name: str | None, mesh: Any, rules: Rules) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a logical axis is cut over, and into how many parts."""
    axes = rules.get(name, ()) if name is not None else ()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if axis in sizes)
    return axes, math.prod(sizes[axis] for axis in axes)


def spec(axes: Axes, shape: Sequence[int], mesh: Any, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose dimensions are named `axes`, on `mesh` (concrete or abstract)."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} name {len(axes)} dimensions, the shape {tuple(shape)} has {len(shape)}")
    parts: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        over, pieces = _cut(name, mesh, rules)
        fits = bool(over) and not used & set(over) and size % pieces == 0
        used.update(over if fits else ())
        parts.append((over[0] if len(over) == 1 else over) if fits else None)
    return PartitionSpec(*parts)


def undivided(axes: Any, abstract: Any, mesh: Mesh) -> dict[str, tuple[int, str, int]]:
    """The logical axes of a parameter tree that `mesh` does not divide: name -> (size, mesh axis, its size)."""
    found: dict[str, tuple[int, str, int]] = {}
    named = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for names, leaf in zip(named, jax.tree.leaves(abstract), strict=True):
        for name, size in zip(names, leaf.shape, strict=True):
            over, pieces = _cut(name, mesh, RULES)
            if name is not None and size % pieces:
                found[name] = (size, " x ".join(over), pieces)
    return found


def sharding(axes: Axes, shape: Sequence[int], mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """`spec` bound to a mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(axes: Any, abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings for a pytree of arrays (or ShapeDtypeStructs) from the matching tree of logical axes."""
    return jax.tree.map(lambda leaf, names: sharding(names, leaf.shape, mesh, rules), abstract, axes)


# Rows in parallel: training and scoring are written for the rows of one device, the collectives over `replica` and
# `fsdp` with them; `tensor` is left to the compiler. A gathered layer then is a reduce-scatter on the way back, and
# stays one whatever the compiler thinks best.

_DATA_RULES: Rules = {name: RULES[name] for name in ("embed", "batch")}
UNSHARDED = "unsharded"  # the name of gathered weights for rematerialisation policies


def over_rows_specs(axes: Any, abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """How the leaves of a tree laid out by `rules` are cut over the data axes: PartitionSpecs for `over_rows`."""
    rules = {name: over for name, over in _DATA_RULES.items() if name in rules}
    return jax.tree.map(lambda leaf, names: spec(names, leaf.shape, mesh, rules), abstract, axes)


def over_rows(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Runs `function` on every device's rows of the batch: inside, `unshard`, `lookup` and `sum_rows` communicate."""
    names = set(_cut("batch", mesh, RULES)[0])
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def row_spec(mesh: Mesh) -> PartitionSpec:
    """The spec of `rows`."""
    return PartitionSpec(_cut("batch", mesh, RULES)[0])


def _manual() -> frozenset[str]:
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def sum_rows(tree: Any, specs: Any = None) -> Any:
    """Sums over the devices' rows, inside `over_rows`; leaves that `specs` cut over an axis are summed over the other.

    Outside it does nothing: all rows are here.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    manual = sorted(axis for axis in _manual() if sizes[axis] > 1)

    def one(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        over = tuple(axis for axis in manual if axis not in spec)
        return jax.lax.psum(leaf, over) if over else leaf

    specs = jax.tree.map(lambda leaf: PartitionSpec(), tree) if specs is None else specs
    return jax.tree.map(one, tree, specs)


def unshard(leaf: jax.Array, axes: Axes, sizes: dict[str, int], dtype: Any) -> jax.Array:
    """Inside `over_rows` gathers, in `dtype`, the dimensions of a parameter that are cut over the data axes.

    `sizes` are their whole sizes by logical name. The gradient is summed in float32 and scattered back.
    """
    for dimension, name in enumerate(axes):
        if name in _DATA_RULES and _DATA_RULES[name] in _manual() and leaf.shape[dimension] != sizes[name]:
            others = compilers_spec(axes, leaf.shape)
            leaf = checkpoint_name(_gather(leaf, _DATA_RULES[name], dimension, dtype, others), UNSHARDED)
    return leaf


def compilers_spec(axes: Axes, shape: Sequence[int]) -> PartitionSpec:
    """How an array is cut over the axes that are left to the compiler: inside `over_rows` that is `tensor`."""
    mesh, manual = jax.sharding.get_abstract_mesh(), _manual()
    rules = {name: over for name, over in RULES.items() if not manual & set(_cut(name, mesh, RULES)[0])}
    return spec(axes, shape, mesh, rules)


def _local(function: Callable[[jax.Array], jax.Array], leaf: jax.Array, others: PartitionSpec) -> jax.Array:
    """A collective on each device's own part: left to the compiler, it would gather the `tensor` axis for it first."""
    mesh = jax.sharding.get_abstract_mesh()
    names = {axis for axis in others if axis is not None and mesh.shape[axis] > 1}
    if not names:
        return function(leaf)
    return jax.shard_map(function, in_specs=others, out_specs=others, axis_names=names, check_vma=False)(leaf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(leaf: jax.Array, axis: Any, dimension: int, dtype: Any, others: PartitionSpec) -> jax.Array:
    return _local(lambda part: jax.lax.all_gather(part.astype(dtype), axis, axis=dimension, tiled=True), leaf, others)


def _gather_forward(
    leaf: jax.Array, axis: Any, dimension: int, dtype: Any, others: PartitionSpec
) -> tuple[jax.Array, jax.Array]:
    return _gather(leaf, axis, dimension, dtype, others), jnp.zeros(0, leaf.dtype)


def _scatter(
    axis: Any, dimension: int, dtype: Any, others: PartitionSpec, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    def summed(part: jax.Array) -> jax.Array:
        part = part.astype(jnp.float32)
        return jax.lax.psum_scatter(part, axis, scatter_dimension=dimension, tiled=True).astype(like.dtype)

    return (_local(summed, gradient, others),)


_gather.defvjp(_gather_forward, _scatter)


def lookup(table: jax.Array, tokens: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Rows of a table [V, D] by token ids [B, ...] -> [B, ..., D] in `dtype`.

    Where the table's columns are cut over devices, inside `over_rows`, each looks up its columns for all rows and they
    exchange the results: the table is never gathered.
    """
    if table.shape[1] == width:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    axis = _DATA_RULES["embed"]
    everyone = jax.lax.all_gather(tokens, axis, axis=0, tiled=True)
    columns = jnp.take(table, everyone, axis=0).astype(dtype)
    return jax.lax.all_to_all(columns, axis, split_axis=0, concat_axis=columns.ndim - 1, tiled=True)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout inside a jitted function; does nothing where no mesh is in scope (`use_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, compilers_spec(axes, array.shape))


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Puts `mesh` in scope for `constrain`; with None, nothing."""
    if mesh is None:
        yield
    else:
        with jax.sharding.set_mesh(mesh):
            yield
