"""Workdirs on an object store (gs://): here one in memory, behind the same etils.epath and fsspec calls.

Orbax writes to buckets through a library of its own, which only the real ones answer: checkpoints lie on disk here.
"""

import json

import fsspec
import pytest
import safetensors.numpy
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from selfplay_jax import game, main, metrics, report
from selfplay_jax.checkpoints import Checkpoints
from selfplay_jax.errors import UserError
from selfplay_jax.selfplay import play


class Bucket(MemoryFileSystem):
    """gs:// in memory; like the real one it knows no rename of its own, and writes whole objects."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        for name in ("gs://", "gcs://"):
            path = str(path).removeprefix(name)
        return MemoryFileSystem._strip_protocol(path)

    def mv(self, *args, **kwargs):
        raise AssertionError("a rename on an object store is a copy, and not atomic")


@pytest.fixture
def bucket(monkeypatch):
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]  # folders, which the test before made
    # epath remembers the file system that it found for a scheme
    epath.backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    yield epath.Path("gs://bucket/run")
    epath.backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def steps(folder):
    return [row["step"] for row in metrics.read(folder / "metrics.jsonl")]


def write(writer, *numbers):
    for number in numbers:
        writer.write({"kind": "train", "round": 0, "step": number, "loss": 1.0})


def test_metrics_are_copied_whole(bucket, monkeypatch):
    with metrics.MetricsWriter(bucket) as writer:
        write(writer, 1, 2)
        assert not (bucket / "metrics.jsonl").exists()
        writer.flush()  # as before a state is saved
        assert steps(bucket) == [1, 2]
        write(writer, 3)
    assert steps(bucket) == [1, 2, 3]
    with metrics.MetricsWriter(bucket, resume_step=2) as writer:
        write(writer, 3, 4)
        monkeypatch.setattr(metrics, "_REMOTE_SECONDS", 0.0)
        write(writer, 5)
        assert steps(bucket) == [1, 2, 3, 4, 5]
    assert len(list((bucket / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_a_game_whose_workdir_is_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(game, "Checkpoints", lambda directory, **more: Checkpoints(tmp_path / "checkpoints", **more))
    small = [
        "--config=configs/spin.py", f"--workdir={bucket}", "--config.rounds=1", "--config.data.examples=8",
        "--config.data.test_examples=4", "--config.data.validation_examples=4", "--config.samples_per_prompt=1",
        "--config.opponents_per_prompt=1", "--config.sft.epochs=1", "--config.sft.batch_size=8",
        "--config.train.epochs=1", "--config.train.batch_size=8", "--config.sampling.chunk=4",
        "--config.sampling.slots=8", "--config.scoring.chunk=4", "--config.scoring.batch_size=8",
        "--config.evaluation.run=likelihood", "--config.evaluation.batch_size=8", "--config.export=every",
    ]  # fmt: skip
    config, workdir = main.read_flags(small)
    play(config, workdir)
    there = {path.removeprefix("/bucket/run/") for path in Bucket.store}
    wanted = ["config.json", "data.json", "report.html", "sft/summary.json", "rounds/000/responses.parquet"]
    assert there >= {*wanted, "rounds/000/summary.json", "hf/theta_000/config.json", "hf/theta_001/model.safetensors"}
    assert not any("part" in path or ".tmp" in path for path in there)
    assert json.loads((bucket / "rounds/000/summary.json").read_text())["steps"] == 1
    assert len(safetensors.numpy.load((bucket / "hf/theta_001/model.safetensors").read_bytes())) > 10
    assert "round 0" in report.table(bucket)
    before = {path: file.modified for path, file in Bucket.store.items() if "/rounds/" in path}
    play(config, workdir)  # nothing is left to do
    assert before == {path: file.modified for path, file in Bucket.store.items() if "/rounds/" in path}
    (epath.Path("gs://bucket/other") / "x").write_text("somebody's")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        play(config, "gs://bucket/other")
