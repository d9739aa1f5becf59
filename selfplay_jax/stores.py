"""Object stores, gs:// and s3://: what may lie there, and how models, data and exports travel.

Workdirs are written where they are, through etils.epath and Orbax. Models and data are read from a copy on the local
disk, exports are built on the local disk and copied: whoever reads or writes them needs files.
"""

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from selfplay_jax.errors import UserError

_SCHEMES = ("gs", "s3")
_CACHE = "~/.cache/selfplay_jax/objects"
# What tells one version of an object from the next, as the file systems of fsspec call it; what one lacks is left out.
_VERSION = ("size", "etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "updated", "LastModified", "created")


def is_remote(path: object) -> bool:
    """Whether `path` lies on an object store: "gs://BUCKET/...", "s3://BUCKET/..." (or a scheme that we refuse)."""
    return "://" in str(path)


def open_path(path: epath.PathLike) -> epath.Path:
    """`path` for reading and writing, here or on an object store.

    Raises:
      UserError: of an object store, what reads it is not installed, or its scheme is unknown.
    """
    if is_remote(path):
        _file_system(str(path))
    return epath.Path(path).expanduser()


def check_workdir(path: epath.PathLike) -> None:
    """Checks that a run can live there, before anything is computed; local paths pass.

    Raises:
      UserError: Orbax has no checkpoints there, or the bucket lets nobody in.
    """
    if not is_remote(path):
        return
    folder = open_path(path)
    if not str(folder).startswith("gs://"):
        raise UserError(
            f"{folder}: checkpoints can be on a disk or on gs://, not on {_scheme(folder)}:// (Orbax does not write "
            "there): take another workdir; models, data and exported models may be there"
        )
    from orbax.checkpoint._src.path import gcs_utils  # what it will ask when it lists its first checkpoint

    from selfplay_jax.progress import say  # brings in jax

    say(f"looking at {folder}")  # without a network it takes a minute to give up
    with _told(str(folder)):
        folder.exists()
        try:
            gcs_utils.is_hierarchical_namespace_enabled(folder)
        except Exception as error:
            raise UserError(
                f"{folder}: Orbax cannot read what kind of bucket this is ({_first_line(error)}); whoever runs this "
                "needs the permission storage.buckets.get on it (roles/storage.legacyBucketReader), and credentials "
                "(gcloud auth application-default login, GOOGLE_CLOUD_PROJECT)"
            ) from error


def local_copy(path: str, among: Callable[[str], bool], now: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """What lies at `path` on an object store, as files on the local disk: those copied before, or copied now.

    They lie in a folder of ~/.cache/selfplay_jax/objects that is named by the path and by the size and version of each
    object, so one that changed is copied again. A file appears there whole, and processes of one host wait for each
    other. The folder may be deleted at any time.

    Args:
      path: an object, a folder, or a glob.
      among: which objects matter, by their name below the folder (or below a glob's first wildcard).
      now: which of those are needed now; the others may come in a later call.
    Returns:
      The file, the folder, or the glob below it, in the way of `path`.
    Raises:
      UserError: nothing is there, or it cannot be read or copied.
    """
    with _told(path):
        system = _file_system(path)
        root, objects = _listed(system, path)
        objects = {name: about for name, about in objects.items() if not name or among(name)}
        if not objects:
            raise UserError(f"{path}: there is no such object or folder, or nothing in it can be used here")
    folder = pathlib.Path(_CACHE).expanduser() / _folder_name(path, objects)
    single = "" in objects
    base = os.path.basename(root)
    names = {(base if single else name): about for name, about in objects.items() if single or now(name)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            missing = {name: about for name, about in names.items() if not (folder / name).exists()}
            if missing:
                with _told(path):
                    _fetch(system, path, missing, folder)
    except OSError as error:
        raise UserError(f"{path} cannot be copied to {folder}: {error.strerror or error}") from error
    if single:
        return folder / base
    pattern = _strip(system, path)[len(root) :].strip("/") if glob.has_magic(path) else ""
    return folder / pattern


def upload(folder: pathlib.Path, path: epath.PathLike, last: str) -> None:
    """Copies a local folder to an object store, in place of what is there.

    last: the file that tells readers that the folder is whole: it goes first and comes last.
    Raises:
      UserError: it cannot be written.
    """
    there = str(path)
    with _told(there, "written"):
        system = _file_system(there)
        if system.exists(f"{there}/{last}"):
            system.rm(f"{there}/{last}")
        if system.exists(there):
            system.rm(there, recursive=True)
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        others = [name for name in names if name != last]
        system.put([str(folder / name) for name in others], [f"{there}/{name}" for name in others])
        system.put_file(str(folder / last), f"{there}/{last}")


def _file_system(path: str) -> Any:
    """fsspec's file system of a path."""
    import fsspec

    scheme = _scheme(path)
    if scheme not in _SCHEMES:
        raise UserError(f"{path}: {scheme}:// is not understood; local paths, gs:// and s3:// are")
    # They tell of every attempt, gcsfs with tracebacks; what fails in the end is told once.
    for name in ("gcsfs", "google.auth._default", "google.auth.compute_engine._metadata"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Listings are asked for anew: others write to the same folders, Orbax and other processes among them.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(
            f"{path}: reading and writing {scheme}:// needs packages that are not installed here "
            f"({_first_line(error)}): pip install 'selfplay_jax[cloud]'"
        ) from error
    except Exception as error:  # google.auth's and botocore's own
        raise UserError(f"{path}: {scheme}:// does not open: {_first_line(error)}") from error


def _scheme(path: object) -> str:
    return str(path).split("://", 1)[0]


def _strip(system: Any, path: str) -> str:
    return str(system._strip_protocol(path)).rstrip("/")


def _listed(system: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder (or the object) that a path names, and by its name below that each object; "" is the object itself."""
    stripped = _strip(system, path)
    if glob.has_magic(path):
        whole = re.split(r"[*?\[]", stripped, maxsplit=1)[0]
        root = whole.rpartition("/")[0]
        found = system.glob(path, detail=True)
    else:
        root = stripped
        found = system.find(path, detail=True)
    files = {str(name): about for name, about in found.items() if about.get("type") == "file"}
    return root, {name[len(root) :].strip("/"): about for name, about in files.items() if not name.endswith("/")}


def _folder_name(path: str, objects: dict[str, dict[str, Any]]) -> str:
    digest = hashlib.sha256(path.encode())
    for name in sorted(objects):
        about = objects[name]
        digest.update(repr([name, *((key, str(about[key])) for key in _VERSION if key in about)]).encode())
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", path.rstrip("/").rsplit("/", 1)[-1])[:60]
    return f"{digest.hexdigest()[:24]}-{readable}"


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time; the lock of one that died is free."""
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(system: Any, path: str, objects: dict[str, dict[str, Any]], folder: pathlib.Path) -> None:
    from selfplay_jax.progress import say  # brings in jax

    size = sum(int(about.get("size") or 0) for about in objects.values())
    say(f"copying {path} ({len(objects)} files, {size / 1e9:.2f} GB) to {folder}")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    for name in objects:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    system.get([str(about["name"]) for about in objects.values()], [str(partial / name) for name in objects])
    for name, about in objects.items():
        if (partial / name).stat().st_size != about["size"]:
            raise UserError(f"{path} changed while it was copied: run the same command again")
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)


@contextlib.contextmanager
def _told(path: str, done: str = "read") -> Iterator[None]:
    """Every library has its own exceptions for a bucket that is not there, refuses, or does not answer."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such object, folder or bucket") from error
    except Exception as error:
        raise UserError(f"{path} cannot be {done}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
