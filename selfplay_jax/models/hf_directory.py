"""A Hugging Face model directory: where it is, its JSON files, and which of its files belong to the tokenizer."""

import contextlib
import fnmatch
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import safetensors
from etils import epath

from selfplay_jax import stores
from selfplay_jax.errors import UserError
from selfplay_jax.models import hf_config
from selfplay_jax.models.config import ModelConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

# What transformers' tokenizers read and write, vocabularies of its older classes and Mistral's own format included.
_TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "tokenizer.model.*", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DOWNLOADED = ("*.safetensors", "*.json", "*.model", "tokenizer.model.*", "*.jinja", "merges.txt", "vocab.txt")
_NOT_DOWNLOADED = ("consolidated*.safetensors", "original/*")  # the same weights again, under other names


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """The configuration of a model directory or Hub repository, without its weights.

    Raises:
        UserError: if there is no such model, or the decoder cannot compute it.
    """
    directory = local_directory(path, weights=False)
    config = read_json(directory / CONFIG)
    generation = optional_json(directory / GENERATION)
    try:
        return hf_config.config_from_hf(config, generation)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def local_directory(path: epath.PathLike, *, weights: bool = True) -> pathlib.Path:
    """`path` itself where it is a directory, else the Hub repository of that name, or the folder on gs:// or s3://,
    downloaded; from an object store without the weights where they are not needed.

    Raises:
        UserError: there is no such model, or it cannot be downloaded.
    """
    if stores.is_remote(path):
        return stores.local_copy(str(path), _is_model_file, lambda name: weights or not name.endswith(".safetensors"))
    directory = pathlib.Path(path).expanduser()
    if directory.is_dir():
        return directory
    if str(path).count("/") > 1 or str(path).startswith((".", "/", "~")):  # no name that the Hub could have
        raise UserError(
            f"{path}: no such directory. If it is what an SFT run exports, play that first (configs/sft.py), or say "
            "where it lies with config.model.path"
        )
    import huggingface_hub  # slow to import, and local directories never need it

    try:
        found = huggingface_hub.snapshot_download(
            str(path), allow_patterns=list(_DOWNLOADED), ignore_patterns=list(_NOT_DOWNLOADED)
        )
    except Exception as error:  # the Hub client raises its own, requests', and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no such directory, and the Hub gave: {reason}") from error
    return pathlib.Path(found)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        UserError: if it is not there, not readable, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model directory needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def optional_json(path: pathlib.Path) -> dict[str, Any]:
    """As `read_json`, and an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, directly in the model directory, belongs to the tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _TOKENIZER_FILES)


def _is_model_file(name: str) -> bool:
    if name.startswith(f"{MORE_TEMPLATES}/"):
        return name.endswith(".jinja")
    unwanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_DOWNLOADED)
    weights = name.endswith((".safetensors", ".safetensors.index.json")) and not unwanted
    return "/" not in name and (weights or name in (CONFIG, GENERATION) or is_tokenizer_file(name))


def tokenizer_files(directory: pathlib.Path) -> list[pathlib.PurePath]:
    """Paths, relative to `directory`, of all its tokenizer and chat template files."""
    top = [file for file in directory.iterdir() if file.is_file() and is_tokenizer_file(file.name)]
    more = [file for file in directory.glob(f"{MORE_TEMPLATES}/*.jinja") if file.is_file()]
    return sorted(file.relative_to(directory) for file in top + more)


@contextlib.contextmanager
def rebuilt(path: epath.PathLike, what: str, last: str) -> Iterator[pathlib.Path]:
    """An empty directory to write into, which then takes the place of `path`: there whole or not at all.

    It lies beside `path`; for an object store, where nothing is renamed, on the local disk, and is copied with the file
    `last` at the end: the folder is whole when that is there.

    Raises:
        UserError: `what` could not be written; an earlier directory of that name stays (not on an object store).
    """
    if stores.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="selfplay_jax_export_") as folder:
            try:
                yield pathlib.Path(folder)
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path}: {what} could not be written to {folder} first: {error}") from error
            stores.upload(pathlib.Path(folder), path, last)
        return
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _replace(path, partial)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path}: {what} could not be written: {error}") from error


def _replace(path: pathlib.Path, partial: pathlib.Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old)
