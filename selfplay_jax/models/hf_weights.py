"""The weight files of a model directory, by their headers alone: what they hold, and what is wrong with them.

`survey` serves both `load_hf`, which refuses at the first problem, and `inspect`, which lists them all.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import safetensors

from selfplay_jax.errors import UserError
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.hf_directory import INDEX, WEIGHTS, read_json
from selfplay_jax.models.hf_tensors import EMBED, HEAD, Tensor, in_file_order, tensors

FLOAT_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_BUFFERS = "rotary_emb.inv_freq"  # old files hold it; it follows from the config


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as a file's header describes it."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why the files do not hold the model: kind is "file", "missing", "unexpected", "shape" or "dtype"."""

    kind: str
    name: str  # of the file or the tensor
    sentence: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the files hold and what the model wants of them.

    listing: the single weight file, or the index.
    files: sizes in bytes; a file that is not there has none.
    stored: every tensor whose header could be read.
    order: (name in the files, parameter, layer) of every tensor that the model wants.
    ignored: stored tensors that the model rightly does without (a tied head, rotary buffers).
    """

    listing: pathlib.Path
    files: dict[pathlib.Path, int | None]
    stored: dict[str, Stored]
    order: list[tuple[str, Tensor, int]]
    ignored: list[str]
    problems: list[Problem]

    def require_sound(self) -> None:
        """Raises UserError with the first problem, and how many there are of its kind."""
        if self.problems:
            first = self.problems[0]
            more = sum(problem.kind == first.kind for problem in self.problems) - 1
            raise UserError(first.sentence + (f" (and {more} more)" if more else ""))


@contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """A safetensors file; whatever fails while it is open becomes a UserError that names it."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file: {error}{_pointer(path)}") from error


def survey(directory: pathlib.Path, config: ModelConfig) -> Weights:
    """Compares the headers of `directory`'s weight files with what `config` needs; reads no tensor.

    Raises:
        UserError: if there are no weight files, or the index cannot be understood.
    """
    listing, listed = _listing(directory)
    files: dict[pathlib.Path, int | None] = {}
    stored: dict[str, Stored] = {}
    problems: list[Problem] = []
    for path, names in listed.items():
        files[path] = path.stat().st_size if path.is_file() else None
        try:
            stored |= _header(path, names, listing)
        except UserError as error:
            problems.append(Problem("file", path.name, str(error)))
    promised = {name: path for path, names in listed.items() for name in names}
    unread = {path for path in listed if any(problem.name == path.name for problem in problems)}
    table = tensors(config)
    if config.tie_embeddings:
        table = _tied(table, stored.keys() | promised.keys())
    order = in_file_order(table)
    if listing not in unread:  # else nothing is known about the only file
        problems += _missing(order, listing, promised, unread, stored, tied=config.tie_embeddings)
    wanted = {name for name, _, _ in order}
    spare = {EMBED, HEAD} if config.tie_embeddings else set()
    ignored = [name for name in stored if name not in wanted and (name in spare or name.endswith(_BUFFERS))]
    problems += _unexpected(stored, wanted.union(ignored))
    problems += _misshapen(order, stored)
    return Weights(listing, files, stored, order, ignored, problems)


def _listing(directory: pathlib.Path) -> tuple[pathlib.Path, dict[pathlib.Path, list[str]]]:
    """The single file or the index, and the files with the tensors that the index says they hold."""
    if (directory / WEIGHTS).is_file():
        return directory / WEIGHTS, {directory / WEIGHTS: []}
    index = directory / INDEX
    if not index.is_file():
        raise UserError(_no_weights(directory))
    listed: dict[pathlib.Path, list[str]] = {}
    for name, file in _weight_map(index).items():
        listed.setdefault(directory / file, []).append(name)
    return index, dict(sorted(listed.items()))


def _weight_map(index: pathlib.Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: expected an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise UserError(
                f"{index}: weight_map.{name}: expected the name of a file in the same directory, got {file!r}"
            )
        if not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map.{name}: {file!r} is no safetensors file; convert with {CONVERT}")
    return weight_map


def _no_weights(directory: pathlib.Path) -> str:
    convert = f"pickled weights are never opened here; convert them once where torch is installed: {CONVERT}"
    pickles = sorted(file.name for file in directory.iterdir() if file.name.endswith(_PICKLES))
    if pickles:
        return f"{directory}: holds {pickles[0]} but no {WEIGHTS}, and {convert}"
    return f"{directory}: holds neither {WEIGHTS} nor {INDEX} ({convert})"


def _header(path: pathlib.Path, names: list[str], listing: pathlib.Path) -> dict[str, Stored]:
    """The file's tensors: those in `names` that it has, all of them where it is the only file."""
    if not path.is_file():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{path}: no such file, but {listing.name} says it holds tensor {names[0]!r}{more}")
    found = {}
    with opened(path) as file:
        held = set(file.keys())
        for name in names or sorted(held):
            if name in held:
                view = file.get_slice(name)
                found[name] = Stored(path, view.get_dtype(), tuple(view.get_shape()))
    return found


def _pointer(path: pathlib.Path) -> str:
    try:
        with path.open("rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return " (it is a git-lfs pointer: fetch the file itself with `git lfs pull`)" if pointer else ""


def _tied(table: list[Tensor], there: Set[str]) -> list[Tensor]:
    """A tied model's matrix has either name; where both are there it is the embedding, as in transformers."""
    if EMBED in there or HEAD not in there:
        return table
    return [dataclasses.replace(entry, names=(HEAD,)) if EMBED in entry.names else entry for entry in table]


def _missing(
    order: list[tuple[str, Tensor, int]],
    listing: pathlib.Path,
    promised: dict[str, pathlib.Path],
    unread: set[pathlib.Path],
    stored: dict[str, Stored],
    *,
    tied: bool,
) -> Iterator[Problem]:
    """Tensors that no file holds; those of an unreadable file are that file's problem."""
    for name, _, _ in order:
        path = promised.get(name)
        if name in stored or path in unread:
            continue
        if path is not None:
            sentence = f"{path}: tensor {name!r} is missing, though {listing.name} says that it is here"
        else:
            hint = "; config.json has tie_word_embeddings false" if name in (EMBED, HEAD) and not tied else ""
            sentence = f"{listing}: tensor {name!r} is missing{hint}"
        yield Problem("missing", name, sentence)


def _unexpected(stored: dict[str, Stored], accepted: set[str]) -> Iterator[Problem]:
    for name, tensor in stored.items():
        if name not in accepted:
            what = f"{tensor.file}: tensor {name!r} has no place in the model that config.json describes"
            yield Problem("unexpected", name, what)


def _misshapen(order: list[tuple[str, Tensor, int]], stored: dict[str, Stored]) -> Iterator[Problem]:
    for name, entry, _ in order:
        if (tensor := stored.get(name)) is None:
            continue
        what = f"{tensor.file}: tensor {name!r}"
        if tensor.dtype not in FLOAT_BYTES:
            supported = ", ".join(FLOAT_BYTES)
            yield Problem("dtype", name, f"{what} has type {tensor.dtype}; only {supported} are supported")
        if tensor.shape != entry.file_shape:
            asked = f"but config.json asks for {entry.file_shape}"
            yield Problem("shape", name, f"{what} has shape {tensor.shape}, {asked}")


def stored_bytes(weights: Weights) -> int:
    """Bytes of the tensors that would be loaded, in the files' types."""
    kept = [weights.stored[name] for name, _, _ in weights.order if name in weights.stored]
    return sum(math.prod(tensor.shape) * FLOAT_BYTES.get(tensor.dtype, 0) for tensor in kept)
