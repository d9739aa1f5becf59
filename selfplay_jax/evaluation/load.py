"""A model to evaluate: a Hugging Face directory, or a player of a run."""

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from selfplay_jax import metrics, partitioning, stores
from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.data import builtin
from selfplay_jax.errors import UserError
from selfplay_jax.models import Model, load_hf, lora, read_config, splash
from selfplay_jax.models.decoder import Params

_DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    path: epath.PathLike,
    *,
    player: str | int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, Params, str]:
    """The model, its parameters, and the directory (or Hub name) of its tokenizer.

    Args:
      path: a Hugging Face directory or Hub name, or a run's workdir; directories also on gs:// or s3://.
      player: which checkpoint of a run: its number, "best" by its evaluations, or "final", the newest (the default).
      dtype: of weights and activations; by default the directory's or the run's own, of a Hub name float32.
      mesh: where the parameters go, in the training layout; None is the first device.
    Raises:
      UserError: no such directory, checkpoint or dtype; a player asked of a directory that is no run.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; it must be one of {', '.join(_DTYPES)}")
    mesh = mesh or partitioning.make_mesh(1, 1, jax.devices()[:1])
    directory = stores.open_path(path)
    config = read_directory(path)
    if "method" in config:
        return _load_player(directory, config, player, dtype, mesh)
    if player is not None:
        raise UserError(f"{path} is no run's workdir (its config.json names no method), so it has no player {player}")
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = dtype or (own if own in _DTYPES else "float32")
    attention = splash.resolve("auto", partitioning.platform(mesh))
    model = Model(read_config(path), compute_dtype=dtype, param_dtype=dtype, attention=attention)
    _, params = load_hf(path, param_dtype=dtype, shardings=model.shardings(mesh))
    return model, params, str(directory if directory.is_dir() else path)


def read_directory(path: epath.PathLike) -> dict[str, Any]:
    """The config.json of a model's directory or a run's workdir; empty for a name that is no directory.

    Raises:
      UserError: a directory that is neither, or a path to nothing.
    """
    directory = stores.open_path(path)
    file = directory / "config.json"
    if file.is_file():
        return metrics.read_json(file)
    if (directory / lora.ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory} holds adapters alone: give the run's workdir, or export with lora.export=merged")
    if directory.is_dir():
        raise UserError(f"{directory} holds no config.json: it is neither a model's directory nor a run's workdir")
    if directory.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise UserError(f"there is no directory {directory}")
    return {}


def _load_player(
    workdir: epath.Path, config: dict[str, Any], player: str | int | None, dtype: str | None, mesh: Mesh
) -> tuple[Model, Params, str]:
    stores.check_workdir(workdir)
    fields = dict(config["model"])
    path = fields.pop("path")
    fields["attention"] = splash.resolve(fields.get("attention", "auto"), partitioning.platform(mesh))
    source = str(builtin.BASE) if path == "builtin" else path
    model = Model(read_config(source), **fields, lora=lora.of_config(config.get("lora", {"rank": 0})))
    if not (workdir / "checkpoints" / "players").is_dir():
        raise UserError(f"{workdir} holds no checkpoints: the run ended before it saved its first player")
    checkpoints = Checkpoints(workdir / "checkpoints", window=config["window"])
    try:
        index = _index(checkpoints, player, workdir)
        params = _restore(checkpoints, index, model, source, mesh)
    finally:
        checkpoints.close()
    model, params = lora.merge(model, params)
    if dtype is not None:
        model = dataclasses.replace(model, compute_dtype=dtype, param_dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return model, params, source


def _restore(checkpoints: Checkpoints, index: int, model: Model, source: str, mesh: Mesh) -> Params:
    """θ_index; of a run with LoRA its adapters joined with the base that the run began with."""
    trained, frozen = model.split(model.shardings(mesh))
    saved = checkpoints.load_player(index, abstract_like(model.split(model.abstract_params())[0], trained))
    base = load_hf(source, param_dtype=model.param_dtype, shardings=frozen)[1] if frozen else {}
    return model.join(saved, base)


def _index(checkpoints: Checkpoints, player: str | int | None, workdir: epath.Path) -> int:
    there = checkpoints.players()
    if not there:
        raise UserError(f"{workdir} holds no checkpoints: the run ended before it saved its first player")
    if player in (None, "final"):
        return there[-1]
    if player == "best":
        best = checkpoints.best()
        if best is None:
            raise UserError(f"no player of {workdir} was evaluated, so none is the best; it holds {there}")
        return best
    if not str(player).isdigit() or int(str(player)) not in there:
        raise UserError(f"{workdir} holds no player {player}; it holds {there}, and there are best and final")
    return int(str(player))
