"""What of a run its mesh does not divide, in sentences: nothing fails for it, but it costs memory or time."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from selfplay_jax import partitioning
from selfplay_jax.models.decoder import Model


def notes(config: Any, model: Model, mesh: Mesh) -> list[str]:
    """Parameters that stay whole on some axis, and batches that are filled up with rows that do not count."""
    return [*_parameters(model, mesh), *_batches(config, mesh)]


def filled(rows: int, mesh: Mesh, microbatches: int) -> int:
    """The rows that training computes for a batch of `rows`: every device gets as many in every microbatch."""
    shards = partitioning.data_shards(mesh) * microbatches
    return -(-rows // shards) * shards


def _parameters(model: Model, mesh: Mesh) -> Iterator[str]:
    uncut = partitioning.undivided(model.logical_axes(), model.abstract_params(), mesh)
    for name, (size, axis, pieces) in uncut.items():
        good = ", ".join(str(n) for n in range(2, mesh.size + 1) if size % n == 0 and mesh.size % n == 0)
        yield (
            f"mesh.{axis}={pieces} does not divide the model's {name} ({size}): those parameters stay whole on every "
            f"device of that axis; {good or 'no other size here'} would cut them"
        )


def _batches(config: Any, mesh: Mesh) -> Iterator[str]:
    parts = config.train.accumulate
    for name in ("sft", "train"):
        rows = config[name].batch_size
        whole = filled(rows, mesh, parts)
        if config[name].epochs and whole > rows:
            split = f"{partitioning.data_shards(mesh)} devices" + (f" x {parts} microbatches" if parts > 1 else "")
            yield (
                f"{name}.batch_size={rows} is filled up to {whole} rows for {split}: {1 - rows / whole:.0%} of each "
                f"step is spent on filler; a multiple of {filled(1, mesh, parts)} would waste nothing"
            )
