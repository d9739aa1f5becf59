"""The mesh, and the one table that says which mesh axis a logical axis is cut over.

Parameters and activations name their axes logically ("embed", "heads", "batch", ...). `RULES` turns a logical name
into a mesh axis; everything else here turns tuples of names into shardings. A dimension that its mesh axis does not
divide stays whole (two key/value heads on four tensor devices, say), so every layout computes the same numbers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from selfplay_jax.errors import UserError

AXES = ("fsdp", "tensor")

# logical axis -> mesh axis. Names not listed are never cut.
RULES: dict[str, str] = {
    # parameters
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    # activations and data
    "batch": "fsdp",
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}

# Decoding reads every weight for every token: with these rules each device keeps whole columns of the weights instead
# of gathering them at each step. For models that do not fit that way, `RULES` serves decoding too.
DECODE_RULES = {name: axis for name, axis in RULES.items() if name != "embed"}

Axes = tuple[str | None, ...]


def make_mesh(fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("fsdp", "tensor") mesh over `devices` (all by default); a size of -1 takes the devices that are left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, sizes = len(devices), [fsdp, tensor]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0 and count % known == 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"mesh.fsdp={fsdp} and mesh.tensor={tensor} do not fit {count} device(s): their product must be {count}, "
            "and at most one of them may be -1 for 'the rest'."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: Axes, shape: Sequence[int], mesh: Any, rules: dict[str, str] = RULES) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose dimensions are named `axes`, on `mesh` (concrete or abstract)."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} name {len(axes)} dimensions, the shape {tuple(shape)} has {len(shape)}")
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    parts: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = rules.get(name) if name is not None else None
        fits = axis is not None and axis not in parts and size % sizes.get(axis, 1) == 0
        parts.append(axis if fits else None)
    return PartitionSpec(*parts)


def sharding(axes: Axes, shape: Sequence[int], mesh: Mesh, rules: dict[str, str] = RULES) -> NamedSharding:
    """`spec` bound to a mesh."""
    return NamedSharding(mesh, spec(axes, shape, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(axes: Any, abstract: Any, mesh: Mesh, rules: dict[str, str] = RULES) -> Any:
    """Shardings for a pytree of arrays (or ShapeDtypeStructs) from the matching tree of logical axes."""
    return jax.tree.map(lambda leaf, names: sharding(names, leaf.shape, mesh, rules), abstract, axes)


def batch_shardings(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Shardings that cut dimension `axis` of every leaf over "fsdp" and leave the rest whole."""

    def one(leaf: Any) -> NamedSharding:
        names: list[str | None] = [None] * len(leaf.shape)
        names[axis] = "batch"
        return sharding(tuple(names), leaf.shape, mesh)

    return jax.tree.map(one, tree)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout inside a jitted function; does nothing where no mesh is in scope (`use_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, spec(axes, array.shape, mesh))


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Puts `mesh` in scope for `constrain`; with None, nothing."""
    if mesh is None:
        yield
    else:
        with jax.sharding.set_mesh(mesh):
            yield
