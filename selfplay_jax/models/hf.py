"""Model directories of Hugging Face into parameters on the devices; `hf_save` is the way back.

Never pickle, never code from a model repository, no torch. Weight files are opened one at a time, and each of their
tensors goes to the devices at once, in the file's dtype and its layer's sharding; it is cast and written into its
stacked parameter there. The host holds two tensors of one file.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.models.hf_directory import local_directory, read_config
from selfplay_jax.models.hf_save import save_hf
from selfplay_jax.models.hf_tensors import Tensor, tensors
from selfplay_jax.models.hf_weights import opened, survey

__all__ = ["load_hf", "read_config", "save_hf"]


def load_hf(
    path: str | pathlib.Path,
    *,
    compute_dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    shardings: Any = None,
) -> tuple[Model, Params]:
    """Reads a model directory, or a repository of the Hub, written by transformers or by `save_hf`.

    Args:
        path: a directory with config.json and model.safetensors, or model.safetensors.index.json and its
            shards; failing that, a Hub repository's name, downloaded through `huggingface_hub`.
        compute_dtype, param_dtype, remat: as in `Model`; the file's tensors are converted to `param_dtype`.
        shardings: a tree like the parameters with a `NamedSharding` or `SingleDeviceSharding` at each leaf, the
            leading axis of stacked layers uncut. Without it, parameters are arrays on the default device.

    Returns:
        The model and its parameters (the tree of `Model.abstract_params`).

    Raises:
        UserError: naming the file and the tensor or field, for anything that cannot be loaded faithfully.
        ValueError: if a sharding cuts the axis of layers.
    """
    directory = local_directory(path)
    config = read_config(directory)
    model = Model(config, compute_dtype=compute_dtype, param_dtype=param_dtype, remat=remat)
    weights = survey(directory, config)
    weights.require_sound()
    leaves = _Leaves(tensors(config), jnp.dtype(param_dtype), shardings)
    places = {name: (entry, layer) for name, entry, layer in weights.order}
    for file in weights.files:
        with opened(file) as tensors_of_file:
            for name in sorted(tensors_of_file.keys()):  # about the order in which they are stored
                if name in places and weights.stored[name].file == file:
                    leaves.put(*places[name], tensors_of_file.get_tensor(name))
    return model, leaves.tree()


class _Leaves:
    """Parameters on their devices, filled tensor by tensor."""

    def __init__(self, table: list[Tensor], dtype: Any, shardings: Any):
        self._dtype = dtype
        self._shardings: dict[tuple[str, ...], Sharding | None] = {
            entry.path: None if shardings is None else _at(shardings, entry.path) for entry in table
        }
        self._transfers = {entry.path: _transfer_sharding(entry, self._shardings[entry.path]) for entry in table}
        stacked = [entry for entry in table if entry.stacked]
        shapes = tuple(entry.full_shape for entry in stacked)
        zeros = _zeros(shapes, dtype, tuple(self._shardings[entry.path] for entry in stacked))()
        self._leaves: dict[tuple[str, ...], jax.Array] = {
            entry.path: leaf for entry, leaf in zip(stacked, zeros, strict=True)
        }
        self._before = stacked[0].path

    def put(self, entry: Tensor, layer: int, tensor: np.ndarray) -> None:
        """Writes a file's tensor into its parameter; afterwards the host's copy is no longer needed."""
        if tensor.dtype == np.float64:
            tensor = tensor.astype(np.float32)  # devices have no float64 unless jax is told so
        tensor = tensor.reshape(entry.split_shape).transpose(entry.from_file)  # a view: the transfer copies once
        transfer, sharding = self._transfers[entry.path], self._shardings[entry.path]
        if transfer is None:
            leaf = jnp.asarray(tensor)
        else:
            leaf = jax.make_array_from_callback(tensor.shape, transfer, lambda index: tensor[index])
        if entry.stacked:
            leaf = _writer(sharding)(self._leaves[entry.path], np.int32(layer), leaf)
        elif leaf.dtype != self._dtype:
            leaf = leaf.astype(self._dtype)
        self._leaves[entry.path] = leaf
        # The next tensor is read while this one is on its way, but no more than that one.
        jax.block_until_ready(self._leaves[self._before])
        self._before = entry.path

    def tree(self) -> Params:
        """The parameters as a nested dict."""
        tree: Params = {}
        for path, leaf in self._leaves.items():
            node: Any = tree
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = leaf
        return tree


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _transfer_sharding(entry: Tensor, sharding: Sharding | None) -> Sharding | None:
    """Where a layer of `entry` goes, so that writing it into the parameter moves nothing between devices."""
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{'.'.join(entry.path)}: a {type(sharding).__name__} is neither Named nor SingleDevice")
    if not entry.stacked:
        return sharding
    if sharding.shard_shape(entry.full_shape)[0] != len(entry.names):
        raise ValueError(f"{'.'.join(entry.path)}: its sharding {sharding.spec} cuts the axis of layers")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


@functools.cache
def _zeros(shapes: tuple[tuple[int, ...], ...], dtype: Any, shardings: tuple[Sharding | None, ...]) -> Any:
    """() -> zeros of these shapes, made where they will live."""
    return jax.jit(lambda: [jnp.zeros(shape, dtype) for shape in shapes], out_shardings=list(shardings))


@functools.cache
def _writer(sharding: Sharding | None) -> Any:
    """(stacked parameter, layer, tensor) -> the parameter with that layer written, in place."""

    def write(leaf: jax.Array, layer: jax.Array, tensor: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, tensor.astype(leaf.dtype), layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
