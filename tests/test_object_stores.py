"""Object stores: a gs:// in memory, behind the same etils.epath and fsspec calls, and a server on this machine that
gcsfs, google-cloud-storage and TensorStore ask over HTTP."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import datasets
import fake_gcs
import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from selfplay_jax import metrics, report, stores
from selfplay_jax.data import builtin, sources
from selfplay_jax.data.templates import load_tokenizer
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation.load import load_model, read_directory
from selfplay_jax.game import Game, claim
from selfplay_jax.main import read_flags
from selfplay_jax.models import hf_directory, load_hf, lora, read_config, save_hf

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Bucket(MemoryFileSystem):
    """gs:// in memory; like the real one it knows no rename of its own, and writes whole objects."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    written: list = []  # noqa: RUF012
    read: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        for name in ("gs://", "gcs://"):
            path = str(path).removeprefix(name)
        return MemoryFileSystem._strip_protocol(path)

    def put_file(self, lpath, rpath, *args, **kwargs):
        self.written.append(rpath.rsplit("/", 1)[-1])
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath, lpath, *args, **kwargs):
        self.read.append(rpath.rsplit("/", 1)[-1])
        super().get_file(rpath, lpath, *args, **kwargs)

    def mv(self, *args, **kwargs):
        raise AssertionError("a rename on an object store is a copy, and not atomic")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where copies are kept
    for name in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    for kept in (Bucket.store, Bucket.written, Bucket.read):
        kept.clear()
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


def copies():
    return sorted(path for path in pathlib.Path("~/.cache/selfplay_jax/objects").expanduser().glob("*/"))


@pytest.fixture
def model(bucket):
    stores.upload(builtin.BASE, "gs://bucket/m", hf_directory.CONFIG)
    epath.Path("gs://bucket/m/pytorch_model.bin").write_bytes(b"never wanted")
    epath.Path("gs://bucket/m/original").mkdir()
    epath.Path("gs://bucket/m/original/model.safetensors").write_bytes(b"neither")
    return "gs://bucket/m"


def test_a_model_is_copied_as_far_as_it_is_needed(model):
    assert read_config(model) == read_config(builtin.BASE)
    assert "config.json" in Bucket.read and "model.safetensors" not in Bucket.read
    assert load_tokenizer(model).get_vocab() == load_tokenizer(builtin.BASE).get_vocab()
    assert not any(name.endswith(".safetensors") for name in Bucket.read)
    jax.tree.map(np.testing.assert_array_equal, load_hf(model)[1], load_hf(builtin.BASE)[1])
    assert sorted(Bucket.read) == sorted(set(Bucket.read)), "copied twice"
    assert not any("bin" in name for name in Bucket.read)
    count = len(Bucket.read)
    _, params, source = load_model(model)
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(builtin.BASE)[1])
    assert source == model and len(Bucket.read) == count
    (folder,) = copies()
    assert sum(path.is_file() for path in folder.rglob("*")) == count
    assert [path.name for path in folder.parent.iterdir() if path != folder] == [f"{folder.name}.lock"]


def test_a_changed_model_is_copied_again(model):
    before = read_config(model)
    config = epath.Path(model) / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"rms_norm_eps": 0.25}))
    assert before != read_config(model)
    assert read_config(model).rms_norm_eps == 0.25
    assert len(copies()) == 2


def test_what_is_no_model_is_told(bucket):
    with pytest.raises(UserError, match=r"gs://bucket/none: there is no such object or folder"):
        read_config("gs://bucket/none")
    with pytest.raises(UserError, match=r"there is no directory gs://bucket/none"):
        read_directory("gs://bucket/none")
    with pytest.raises(UserError, match=r"ftp:// is not understood"):
        read_config("ftp://bucket/m")


def test_processes_that_copy_at_once_copy_once(model):
    errors = []

    def work():
        try:
            assert (hf_directory.local_directory(model) / "model.safetensors").stat().st_size > 1000
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(Bucket.read) == sorted(set(Bucket.read))


def test_a_copy_that_was_cut_short_is_made_again(model, monkeypatch):
    def cut(self, rpath, lpath, *args, **kwargs):
        pathlib.Path(lpath).write_bytes(b"{")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "get_file", cut)
        with pytest.raises(UserError, match="changed while it was copied"):
            read_config(model)
    assert read_config(model) == read_config(builtin.BASE)


ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]


def texts(source, **more):
    return [example.response for example in sources.load(source, **more)[0]]


def test_data_on_a_bucket(bucket, tmp_path):
    def put(name, rows):
        path = epath.Path(f"gs://bucket/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    put("m.jsonl", ROWS)
    assert texts("gs://bucket/m.jsonl") == ["a0", "a1", "a2", "a3"]
    put("m.jsonl", ROWS[:2])
    assert texts("gs://bucket/m.jsonl") == ["a0", "a1"]
    put("d/train.jsonl", ROWS[:1])
    put("d/test.jsonl", ROWS[1:2])
    assert texts("gs://bucket/d", split="test") == texts("gs://bucket/d/te*.jsonl") == ["a1"]
    assert Bucket.read.count("train.jsonl") == 1
    put("hub/easy/train-00000-of-00001.jsonl", ROWS[2:3])
    put("hub/hard/train-00000-of-00001.jsonl", ROWS[3:])
    assert texts("gs://bucket/hub:hard") == ["a3"]
    with pytest.raises(UserError, match="name one: gs://bucket/hub:easy"):
        sources.load("gs://bucket/hub")
    with pytest.raises(UserError, match=r"gs://bucket/none.jsonl: there is no such object"):
        sources.load("gs://bucket/none.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    stores.upload(tmp_path / "saved", "gs://bucket/saved", "state.json")
    assert texts("gs://bucket/saved") == ["a0", "a1", "a2", "a3"]


def test_an_export_to_a_bucket_is_whole_when_its_config_is_there(bucket, monkeypatch):
    model, params = load_hf(builtin.BASE)
    game = types.SimpleNamespace(workdir=bucket, model=model, config=None, _exports_adapters=False)
    target = bucket / "hf" / "final"
    put_file = Bucket.put_file

    def killed(self, lpath, rpath, *args, **kwargs):
        if rpath.endswith("final/config.json"):
            raise KeyboardInterrupt
        put_file(self, lpath, rpath, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save_hf(target, model, params, source=builtin.BASE)
    assert (target / "generation_config.json").exists() and (target / "tokenizer_config.json").exists()
    assert not Game.exported(game, "final")
    (target / "model-00002-of-00002.safetensors").write_bytes(b"an earlier export's")
    save_hf(str(target), model, params, source=builtin.BASE)
    assert Bucket.written[-1] == "config.json"
    assert Game.exported(game, "final")
    assert not (target / "model-00002-of-00002.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, load_hf(str(target))[1], params)
    (target / "metrics.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"holds metrics.jsonl, which is no part"):
        save_hf(target, model, params)
    assert not pathlib.Path("gs:").exists()


def test_adapters_are_exported_to_a_bucket(bucket):
    model, _ = load_hf(builtin.BASE)
    fields = {"rank": 2, "alpha": 4.0, "targets": "q"}
    model = dataclasses.replace(model, lora=lora.of_config(fields))
    params = model.init(jax.random.key(0))
    lora.save_peft("gs://bucket/adapters", model, params, base="x")
    assert Bucket.written == ["adapter_model.safetensors", "adapter_config.json"]


def test_where_no_run_can_live(bucket):
    with pytest.raises(UserError, match=r"checkpoints can be on a disk or on gs://, not on s3://"):
        stores.check_workdir("s3://bucket/run")
    with pytest.raises(UserError, match=r"Orbax cannot read what kind of bucket this is"):
        stores.check_workdir(bucket)  # nothing that google-cloud-storage could ask
    stores.check_workdir("runs/here")


def test_a_folder_that_holds_something_else_is_no_workdir(bucket):
    (bucket / "rounds").mkdir(parents=True)
    (bucket / "rounds" / "x").write_text("somebody's")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        claim(bucket, read_flags(["--config=configs/spin.py"])[0])


def test_reports_of_buckets(bucket, tmp_path, capsys):
    bucket.mkdir(parents=True)
    metrics.write_json(bucket / "config.json", {"method": "spin", "rounds": 0})
    assert report.main([str(bucket)]) == 0
    assert (bucket / "report.html").exists()
    assert report.main([str(bucket), str(bucket), "--output=gs://bucket/both.html"]) == 0
    assert epath.Path("gs://bucket/both.html").exists()
    assert report.main(["gs://bucket/none"]) == 1
    assert "no run directory gs://bucket/none" in capsys.readouterr().err


def python(code, *arguments, **environment):
    """Runs code in a process of its own, without a network and without credentials."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GCE_METADATA_HOST": "127.0.0.1:1", **environment}
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment |= {"NO_GCE_CHECK": "true", "XLA_FLAGS": one_device}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_the_locked_environment_has_what_buckets_need():
    done = python(
        "import fsspec, google.cloud.storage\n"
        "print(fsspec.get_filesystem_class('gs').__module__, fsspec.get_filesystem_class('s3').__module__)"
    )
    assert done.returncode == 0, done.stderr
    assert [name.split(".")[0] for name in done.stdout.split()] == ["gcsfs", "s3fs"]


READ = """
import sys
from selfplay_jax import report, sample
prompts, *outputs = sys.argv[1:]
report.main(["gs://bucket/run"])
for model, output in zip(["gs://bucket/run", "gs://bucket/run/hf/theta_001"], outputs):
    code = sample.main(["--model", model, "--prompts", prompts, "--output", output, "--max_new_tokens", "4"])
    assert not code, model
"""
MAIN = "import sys; from selfplay_jax.main import main; sys.exit(main(sys.argv[1:]))"


def test_without_its_packages_a_bucket_is_one_sentence():
    flags = ["--config=configs/spin.py", "--workdir=gs://bucket/run"]
    done = python("import sys; sys.modules['gcsfs'] = None\n" + MAIN, *flags)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: gs://bucket/run: reading and writing gs:// needs packages")
    assert "pip install 'selfplay_jax[cloud]'" in done.stderr and "Traceback" not in done.stderr


CHECKPOINTS = """
import jax, numpy as np
from etils import epath
from selfplay_jax import stores
from selfplay_jax.checkpoints import Checkpoints, abstract_like
where = "gs://bucket/run/checkpoints"
stores.check_workdir(where)
params = {"w": jax.numpy.arange(6000.0).reshape(60, 100)}
like = abstract_like(params, {"w": params["w"].sharding})
there = Checkpoints(where, window=1)
for i in range(3):
    there.save_player(i, {"w": params["w"] + i}, score=-i)
    there.save_state(i + 1, params, {"at": i})
there.close()
there = Checkpoints(epath.Path(where), window=1)
assert there.players() == [0, 2] and there.best() == 0 and there.state_step() == 3, there.players()
np.testing.assert_array_equal(there.load_player(2, like)["w"], params["w"] + 2)
assert there.load_state(3, like)[1] == {"at": 2}
there.close()
"""


def test_checkpoints_really_lie_in_the_bucket(tmp_path):
    with fake_gcs.serving("bucket") as server:
        done = python(CHECKPOINTS, **server.environment())
        assert done.returncode == 0, done.stderr
        folders = {"/".join(name.split("/")[3:5]) for name in server.objects}
    assert folders == {"players/0", "players/2", "state/3"}
    assert not (ROOT / "gs:").exists()


def test_a_bucket_that_is_not_there_is_one_sentence():
    with fake_gcs.serving("other") as server:
        flags = ["--config=configs/spin.py", "--workdir=gs://bucket/run"]
        done = python(MAIN, *flags, **server.environment())
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1 and "gs://bucket/run" in done.stderr and "does not exist" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three processes one after the other
def test_a_game_whose_workdir_and_model_are_in_a_bucket(tmp_path):
    small = [
        "--config=configs/spin.py", "--config.rounds=1", "--config.data.examples=8",
        "--config.data.test_examples=4", "--config.data.validation_examples=4", "--config.samples_per_prompt=1",
        "--config.opponents_per_prompt=1", "--config.sft.epochs=1", "--config.sft.batch_size=8",
        "--config.train.epochs=1", "--config.train.batch_size=8", "--config.sampling.chunk=4",
        "--config.sampling.slots=8", "--config.scoring.chunk=4", "--config.scoring.batch_size=8",
        "--config.evaluation.run=likelihood", "--config.evaluation.batch_size=8", "--config.export=every",
        f"--config.compilation_cache={tmp_path}/xla",
    ]  # fmt: skip
    workdir = "--workdir=gs://bucket/run"
    with fake_gcs.serving("bucket") as server:
        environment = server.environment() | {"HOME": str(tmp_path / "home")}

        def succeeds(code, *arguments):
            done = python(code, *arguments, **environment)
            assert done.returncode == 0, done.stderr
            return done.stdout + done.stderr

        succeeds(MAIN, *small, workdir)
        there = {name.removeprefix("bucket/run/"): content for name, (_, content) in server.objects.items()}
        wanted = ["config.json", "data.json", "report.html", "sft/summary.json", "rounds/000/responses.parquet"]
        assert there.keys() >= {*wanted, "rounds/000/summary.json", "hf/theta_000/config.json"}
        assert not any("part" in name or ".tmp" in name or ".seen" in name for name in there)
        assert json.loads(there["rounds/000/summary.json"])["steps"] == 1
        assert len(safetensors.numpy.load(there["hf/theta_001/model.safetensors"])) > 10
        before = {name: number for name, (number, _) in server.objects.items() if "report" not in name}
        succeeds(MAIN, *small, workdir)  # nothing is left to do
        changed = {name for name, number in before.items() if server.objects[name][0] != number}
        assert not {name for name in changed if "/rounds/" in name or "/checkpoints/" in name or "/hf/" in name}
        # From the bucket: the report, and answers of a checkpoint and of an export.
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": "2+2="}) + "\n")
        said = succeeds(READ, prompts, tmp_path / "checkpoint.jsonl", tmp_path / "export.jsonl")
        assert "round 0" in said
        answers = [json.loads((tmp_path / name).read_text()) for name in ("checkpoint.jsonl", "export.jsonl")]
        assert answers[0]["response"] == answers[1]["response"]
