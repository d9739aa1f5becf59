"""Sources that a library opens: the hub, datasets saved to disk, tensorflow-datasets without TensorFlow."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfplay_jax.data.formats import Row, Table, arrow_rows, first_line, no_split
from selfplay_jax.data.records import Malformed
from selfplay_jax.errors import UserError

TFDS = "tfds:"


def open_hub(source: str, split: str) -> Table:
    """A dataset of the hub, "owner/name" or "owner/name:config", through `datasets` and its cache.

    Raises:
      UserError: it cannot be had, with what was tried; or it has no such split, with those it has.
    """
    import datasets

    datasets.disable_progress_bars()
    name, _, config = source.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # network, name, config, split, builder: each its own exception type
        unknown = re.match(r"Unknown split .*? Should be one of \[(.*)\]", str(error))
        if unknown:
            raise no_split(source, split, re.findall(r"'([^']*)'", unknown.group(1))) from error
        call = f"datasets.load_dataset({name!r}{f', {config!r}' if config else ''}, split={split!r})"
        raise UserError(
            f"data source {source!r} is neither a local file nor loadable from the Hugging Face hub: {call} "
            f"failed with: {first_line(error)}; check the name, or give a .jsonl, .json or .parquet file"
        ) from error
    return _table(source, data)


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path, split: str) -> Table:
    """A directory that `save_to_disk` wrote; of a single Dataset, `split` is of no effect.

    Raises:
      UserError: no such split (those there are get named), or files are missing or broken.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # JSON, Arrow, missing files: the user's remedy is the same
        raise UserError(
            f"{path}: datasets.load_from_disk failed with: {first_line(error)}; save the dataset again"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise no_split(str(path), split, data)
        data = data[split]
    return _table(str(path), data)


def _table(label: str, data: Any) -> Table:
    return Table(label, list(data.column_names), arrow_rows(data.with_format("arrow").iter(1000)))


def open_tfds(name: str, split: str, data_dir: str = "") -> Table:
    """A dataset of tensorflow-datasets, read from its ArrayRecord files; TensorFlow is never imported.

    Args:
      name: "gsm8k", "name/config:version", or the path of a prepared dataset (the directory of dataset_info.json).
      data_dir: where datasets are prepared; "" is ~/tensorflow_datasets.
    Raises:
      UserError: it is not prepared and cannot be, is in another file format, or has no such split.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    source, folder = TFDS + name, Path(name).expanduser()
    try:
        if folder.is_dir() or name.startswith((".", "/", "~")):
            builder = tfds.builder_from_directory(folder)
        else:
            builder = _prepared(tfds, name, str(Path(data_dir or "~/tensorflow_datasets").expanduser()))
    except Exception as error:  # no such name or directory, network, checksums: each its own exception type
        raise UserError(
            f"data source {source!r} is not prepared in {folder if folder.is_absolute() else _where(data_dir)} and "
            f"tensorflow-datasets cannot prepare it: {first_line(error)}; prepare it where it can be downloaded, with "
            'file_format="array_record", and set data.tfds_dir or give "tfds:DIRECTORY"'
        ) from error
    if split.split("[")[0] not in builder.info.splits:
        raise no_split(source, split, builder.info.splits)
    try:
        data = builder.as_data_source(split=split)
        rows = _tfds_rows(source, data)
    except Exception as error:  # TFRecord files are refused here
        raise UserError(
            f"data source {source!r} cannot be read without TensorFlow: {first_line(error)}; prepare it again with "
            'file_format="array_record"'
        ) from error
    return Table(source, list(builder.info.features), rows)


def _where(data_dir: str) -> str:
    return data_dir or "~/tensorflow_datasets"


def _prepared(tfds: Any, name: str, data_dir: str) -> Any:
    """The builder of a dataset that lies in `data_dir`, prepared now if it does not yet."""
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except DatasetNotFoundError:
        _register(tfds, re.split("[/:]", name)[0])
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        return builder


def _register(tfds: Any, name: str) -> None:
    """Imports the module of one of the older datasets (gsm8k is one): until then the registry does not know it."""
    root = Path(tfds.__file__).parent
    for file in [*root.glob(f"*/{name}/{name}.py"), *root.glob(f"*/{name}.py")]:
        importlib.import_module(".".join(("tensorflow_datasets", *file.relative_to(root).with_suffix("").parts)))


def _tfds_rows(source: str, data: Any) -> Iterator[Row]:
    """Every record, bytes and NumPy values as plain Python ones."""
    for index in range(len(data)):
        position = f"[{index}]"
        try:
            record = data[index]
        except Exception as error:  # a broken file
            raise UserError(f"{source}{position} cannot be read: {first_line(error)}; prepare it again") from error
        try:
            yield position, {name: _plain(value) for name, value in record.items()}
        except UnicodeDecodeError as error:
            yield position, Malformed(f"not valid UTF-8 ({error.reason} at byte {error.start + 1} of a text)")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items()}
        if {"role", "content"} <= plain.keys() and isinstance(plain["role"], list):
            # A sequence of messages comes as one dict of columns.
            return [dict(zip(plain, message, strict=True)) for message in zip(*plain.values(), strict=True)]
        return plain
    return value
