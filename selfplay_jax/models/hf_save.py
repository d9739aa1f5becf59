"""Parameters into a model directory of Hugging Face, which transformers, vLLM and lm-evaluation-harness open.

Safetensors files are written as they are read: tensor by tensor. A layer's slice is cut, transposed and cast on the
devices, fetched and appended to its file, so the host never holds a whole parameter, nor a whole file. Of several
processes the lead writes; the others bring their part of each tensor.
"""

import functools
import itertools
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from selfplay_jax import distributed, stores
from selfplay_jax.errors import UserError
from selfplay_jax.models import hf_config
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.models.hf_directory import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION,
    INDEX,
    MORE_TEMPLATES,
    WEIGHTS,
    is_tokenizer_file,
    local_directory,
    optional_json,
    rebuilt,
    tokenizer_files,
)
from selfplay_jax.models.hf_tensors import Tensor, in_file_order, tensors

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_hf(
    path: epath.PathLike,
    model: Model,
    params: Params,
    *,
    source: epath.PathLike | None = None,
    max_shard_bytes: float = 5e9,
    dtype: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a model directory that transformers, vLLM and lm-evaluation-harness open.

    The directory is built beside `path` and renamed, so it is there whole or not at all; an earlier export of
    the same name is replaced. On gs:// and s3:// it is copied there file by file, config.json last. A tied model
    stores its embedding once.

    Args:
        path: the directory to write, here or on gs:// or s3://.
        model, params: as from `load_hf`; parameters may be sharded and reach the host one layer's tensor at a time.
        source: a model directory whose tokenizer and chat template files are copied byte for byte and, if it is of
            the same family, whose config.json and generation_config.json lend their other fields.
        max_shard_bytes: weights larger than this are split over several files with an index.
        chat_template: Jinja text to write as chat_template.jinja in place of the source's.
        dtype: the type of the stored tensors, "float32", "bfloat16" or "float16"; None keeps the parameters'.

    Raises:
        UserError: if `path` holds something that is no export, or cannot be written, or `dtype` is another type.
    """
    path = stores.open_path(path)
    dtype = model.param_dtype if dtype is None else dtype
    if dtype not in _DTYPES:
        raise UserError(f"dtype: exported tensors can be {', '.join(_DTYPES)}, not {dtype!r}")
    plan = _plan(model, max_shard_bytes, dtype)
    if not distributed.is_lead():
        for _, entry, layer in itertools.chain(*plan):
            _fetch(entry, layer, params, dtype)
        distributed.barrier("exported")
        return
    origin = None if source is None else local_directory(source, weights=False)
    _refuse_foreign(path)
    with rebuilt(path, "the model", CONFIG) as partial:
        _write_configs(partial, model, origin, dtype)
        if origin is not None:
            _copy_tokenizer(origin, partial)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        _write_weights(partial, plan, params, dtype)
    distributed.barrier("exported")


def _write_configs(directory: pathlib.Path, model: Model, origin: pathlib.Path | None, dtype: str) -> None:
    lent = optional_json(origin / CONFIG) if origin is not None else {}
    generation = optional_json(origin / GENERATION) if origin is not None else {}
    if lent.get("model_type") != model.config.family:
        lent, generation = {}, {}
    fields = hf_config.config_to_hf(model.config, dtype=dtype, source=lent)
    for name, content in (
        (CONFIG, fields),
        (GENERATION, generation | hf_config.token_fields(model.config)),
    ):
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _copy_tokenizer(origin: pathlib.Path, directory: pathlib.Path) -> None:
    for name in tokenizer_files(origin):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, directory / name)


_Shard = list[tuple[str, Tensor, int]]


def _plan(model: Model, max_shard_bytes: float, dtype: str) -> list[_Shard]:
    """The files of weights: by file the tensors (name, entry, layer), in order."""
    width = jnp.dtype(dtype).itemsize
    plan: list[_Shard] = [[]]
    room = max_shard_bytes
    for item in in_file_order(tensors(model.config)):
        size = math.prod(item[1].file_shape) * width
        if plan[-1] and size > room:
            plan.append([])
            room = max_shard_bytes
        plan[-1].append(item)
        room -= size
    return plan


def _write_weights(directory: pathlib.Path, plan: list[_Shard], params: Params, dtype: str) -> None:
    shard_of: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(plan, 1):
        name = WEIGHTS if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        total += _write_shard(directory / name, shard, params, dtype)
        shard_of |= {tensor: name for tensor, _, _ in shard}
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: pathlib.Path, shard: _Shard, params: Params, dtype: str) -> int:
    """One safetensors file: the header's length (8 bytes, little endian), the header, the tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry, _ in shard:
        begin, end = end, end + math.prod(entry.file_shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": entry.file_shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, entry, layer in shard:
            tensor = _fetch(entry, layer, params, dtype)
            file.write(tensor.reshape(-1).view(np.uint8).data)
    return end


def _fetch(entry: Tensor, layer: int, params: Params, dtype: str) -> np.ndarray:
    """The bytes of one tensor of the file, with heads and head_dim apart, on the host."""
    leaf: Any = params
    for key in entry.path:
        leaf = leaf[key]
    if isinstance(leaf, np.ndarray):  # already here: not to be sent to the devices whole, for every layer
        leaf = jnp.asarray(leaf[layer] if entry.stacked else leaf)
    elif entry.stacked:
        leaf = _cut(leaf, np.int32(layer))
    return np.ascontiguousarray(distributed.to_host(_lay_out(leaf, entry.to_file, dtype)))


@jax.jit
def _cut(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _lay_out(leaf: jax.Array, axes: tuple[int, ...], dtype: str) -> jax.Array:
    return leaf.transpose(axes).astype(dtype)


def _refuse_foreign(path: epath.Path) -> None:
    """An existing directory is replaced as a whole, so it must be one that `save_hf` could have written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another name for the exported model")
    ours = {CONFIG, GENERATION, INDEX, MORE_TEMPLATES}
    if path.is_dir():
        foreign = [
            file.name
            for file in path.iterdir()
            if file.name not in ours and file.suffix != ".safetensors" and not is_tokenizer_file(file.name)
        ]
        if foreign:
            raise UserError(f"{path}: holds {min(foreign)}, which is no part of an exported model; choose another name")
