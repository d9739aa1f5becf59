"""Model directories of Hugging Face: safetensors in, safetensors out.

Never pickle, never code from a model repository, no torch. Tensors are read one parameter at a time from the
mapped file and go straight to where they will live: host memory holds about one stacked parameter at a time.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from selfplay_jax.errors import UserError
from selfplay_jax.models import hf_config
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.models.hf_tensors import EMBED, HEAD, Tensor, tensors

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """The configuration of a model directory or Hub repository, without its weights.

    Raises:
        UserError: if there is no such model, or the decoder cannot compute it.
    """
    return _read_config(_local_directory(path))


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
        shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; every parameter is
            put there as soon as it is read. Without it, parameters are arrays on the default device.

    Returns:
        The model and its parameters (the tree of `Model.abstract_params`).

    Raises:
        UserError: naming the file and the tensor or field, for anything that cannot be loaded faithfully.
    """
    directory = _local_directory(path)
    config = _read_config(directory)
    model = Model(config, compute_dtype=compute_dtype, param_dtype=param_dtype, remat=remat)
    params: Params = {}
    with contextlib.ExitStack() as stack:
        reader = _Reader(directory, stack)
        table = reader.resolve(tensors(config), tied=config.tie_embeddings)
        for entry in table:
            leaf = reader.leaf(entry, np.dtype(jnp.dtype(param_dtype)))
            *parents, last = entry.path
            node: Any = params
            target = shardings
            for key in parents:
                node, target = node.setdefault(key, {}), target and target[key]
            node[last] = _place(leaf, target and target[last])
    return model, params


def save_hf(
    path: str | pathlib.Path,
    model: Model,
    params: Params,
    *,
    source: str | pathlib.Path | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a model directory that transformers, vLLM and lm-evaluation-harness open.

    The directory is built beside `path` and renamed, so it is there whole or not at all; an earlier export of
    the same name is replaced. Tensors keep the parameters' dtype; a tied model stores its embedding once.

    Args:
        path: the directory to write.
        model, params: as from `load_hf`; parameters may be sharded and reach the host one at a time.
        source: a model directory whose tokenizer files are copied and, if it is of the same family, whose
            config.json and generation_config.json lend their other fields.
        max_shard_bytes: weights larger than this are split over several files with an index.

    Raises:
        UserError: if `path` holds something that is no export, or cannot be written.
    """
    path = pathlib.Path(path)
    origin = None if source is None else _local_directory(source)
    _refuse_foreign(path)
    tokenizer = [] if origin is None else [origin / name for name in _TOKENIZER_FILES]
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_configs(partial, model, origin)
        for file in tokenizer:
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        _write_weights(partial, model, params, max_shard_bytes)
        _replace(path, partial)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path}: the model could not be written: {error}") from error


def _local_directory(path: str | pathlib.Path) -> pathlib.Path:
    directory = pathlib.Path(path).expanduser()
    if directory.is_dir():
        return directory
    import huggingface_hub  # slow to import, and local directories never need it

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the Hub client raises its own, requests', and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no such directory, and the Hub gave: {reason}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model directory needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_config(directory: pathlib.Path) -> ModelConfig:
    config = _read_json(directory / "config.json")
    generation = _optional_json(directory / "generation_config.json")
    try:
        return hf_config.config_from_hf(config, generation)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error


class _Reader:
    """The open weight files of one directory."""

    def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack):
        self._stack = stack
        self._files: dict[pathlib.Path, Any] = {}
        index = directory / _INDEX
        if (directory / _WEIGHTS).is_file():
            self.listing = directory / _WEIGHTS
            self.where = dict.fromkeys(self._open(self.listing).keys(), self.listing)
        elif index.is_file():
            self.listing = index
            self.where = {name: directory / file for name, file in _weight_map(index).items()}
        else:
            raise UserError(_no_weights(directory))

    def resolve(self, table: list[Tensor], *, tied: bool) -> list[Tensor]:
        """Checks that the files hold the tensors of `table` and no others; a tied one has either name."""
        if tied and EMBED not in self.where and HEAD in self.where:
            table = [dataclasses.replace(entry, names=(HEAD,)) if EMBED in entry.names else entry for entry in table]
        wanted = {name for entry in table for name in entry.names}
        missing = [name for entry in table for name in entry.names if name not in self.where]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            hint = "; config.json has tie_word_embeddings false" if missing[0] in (EMBED, HEAD) and not tied else ""
            raise UserError(f"{self.listing}: tensor {missing[0]!r} is missing{more}{hint}")
        ignored = {EMBED, HEAD} if tied else set()
        extra = [
            name for name in self.where if name not in wanted | ignored and not name.endswith("rotary_emb.inv_freq")
        ]
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(
                f"{self.where[extra[0]]}: tensor {extra[0]!r}{more} has no place in the model that "
                "config.json describes"
            )
        return table

    def leaf(self, entry: Tensor, dtype: np.dtype) -> np.ndarray:
        """One whole parameter on the host, its layers stacked."""
        if not entry.stacked:
            return np.ascontiguousarray(entry.from_file(self._tensor(entry, 0)).astype(dtype))
        leaf = np.empty((len(entry.names), *entry.shape), dtype)
        for layer in range(len(entry.names)):
            leaf[layer] = entry.from_file(self._tensor(entry, layer)).astype(dtype)
        return leaf

    def _tensor(self, entry: Tensor, layer: int) -> np.ndarray:
        name = entry.names[layer]
        path = self.where[name]
        file = self._open(path, name)
        try:
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if dtype not in _FLOATS:
                raise UserError(f"{path}: tensor {name!r} has type {dtype}; only {', '.join(_FLOATS)} are supported")
            if shape != entry.file_shape:
                raise UserError(
                    f"{path}: tensor {name!r} has shape {shape}, but config.json asks for {entry.file_shape}"
                )
            return file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: tensor {name!r} cannot be read: {error}") from error

    def _open(self, path: pathlib.Path, name: str = "") -> Any:
        if path not in self._files:
            if not path.is_file():
                raise UserError(f"{path}: no such file, but {self.listing.name} says it holds tensor {name!r}")
            try:
                self._files[path] = self._stack.enter_context(safetensors.safe_open(path, framework="np"))
            except (OSError, safetensors.SafetensorError) as error:
                what = f" (for tensor {name!r})" if name else ""
                raise UserError(f"{path}: damaged or not a safetensors file{what}: {error}") from error
        return self._files[path]


def _weight_map(index: pathlib.Path) -> Mapping[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: expected an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise UserError(
                f"{index}: weight_map.{name}: expected the name of a file in the same directory, got {file!r}"
            )
    return weight_map


def _no_weights(directory: pathlib.Path) -> str:
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return f"{directory}: holds neither {_WEIGHTS} nor {_INDEX}"
    return (
        f"{directory}: holds {pickles[0]} but no {_WEIGHTS}, and pickled weights are never opened here; "
        "convert them once where torch is installed: "
        "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def _place(leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def _write_configs(directory: pathlib.Path, model: Model, origin: pathlib.Path | None) -> None:
    lent = _optional_json(origin / "config.json") if origin is not None else {}
    generation = _optional_json(origin / "generation_config.json") if origin is not None else {}
    if lent.get("model_type") != model.config.family:
        lent, generation = {}, {}
    fields = hf_config.config_to_hf(model.config, dtype=model.param_dtype, source=lent)
    for name, content in (
        ("config.json", fields),
        ("generation_config.json", generation | hf_config.token_fields(model.config)),
    ):
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _write_weights(directory: pathlib.Path, model: Model, params: Params, max_shard_bytes: float) -> None:
    table = tensors(model.config)
    width = jnp.dtype(model.param_dtype).itemsize
    sizes = {name: int(np.prod(entry.file_shape)) * width for entry in table for name in entry.names}
    plan: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if plan[-1] and size > room:
            plan.append([])
            room = max_shard_bytes
        plan[-1].append(name)
        room -= size
    files = [_WEIGHTS] if len(plan) == 1 else [
        f"model-{number:05}-of-{len(plan):05}.safetensors" for number in range(1, len(plan) + 1)
    ]  # fmt: skip
    shard_of = {name: file for file, names in zip(files, plan, strict=True) for name in names}
    last_of = {names[-1]: file for file, names in zip(files, plan, strict=True)}
    shard: dict[str, np.ndarray] = {}
    for entry in table:
        leaf: Any = params
        for key in entry.path:
            leaf = leaf[key]
        for name, tensor in entry.to_file(np.asarray(jax.device_get(leaf))):
            shard[name] = tensor
            if name in last_of:
                file = directory / last_of[name]
                safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
                shutil.copymode(directory / "config.json", file)  # safetensors leaves it 0600
                shard = {}
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shard_of}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _refuse_foreign(path: pathlib.Path) -> None:
    """An existing directory is replaced as a whole, so it must be one that `save_hf` could have written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; choose another name for the exported model")
    ours = {"config.json", "generation_config.json", _INDEX, *_TOKENIZER_FILES}
    if path.is_dir():
        foreign = [file.name for file in path.iterdir() if file.name not in ours and file.suffix != ".safetensors"]
        if foreign:
            raise UserError(f"{path}: holds {min(foreign)}, which is no part of an exported model; choose another name")


def _replace(path: pathlib.Path, partial: pathlib.Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old)
