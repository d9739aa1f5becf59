"""Real processes, killed at any moment: the same command goes on and ends with the same bytes."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# One sampling chunk, one scoring chunk and one step are the grain; small enough that kills fall into all of them.
_SMALL = [
    "--config.rounds=2", "--config.data.examples=24", "--config.data.test_examples=16",
    "--config.data.validation_examples=8", "--config.samples_per_prompt=2", "--config.opponents_per_prompt=1",
    "--config.sft.epochs=2", "--config.sft.batch_size=4", "--config.train.epochs=2", "--config.train.batch_size=4",
    "--config.train.checkpoint_every=3", "--config.sampling.chunk=6", "--config.sampling.slots=8",
    "--config.scoring.chunk=6", "--config.scoring.batch_size=6", "--config.evaluation.samples_per_prompt=1",
    "--config.evaluation.run=sampled,likelihood", "--config.evaluation.batch_size=8",
]  # fmt: skip


def command(workdir, *more):
    return [
        sys.executable,
        "-m",
        "selfplay_jax.main",
        "--config=configs/tpaw.py",
        f"--workdir={workdir}",
        *_SMALL,
        *more,
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation cache for all processes of this module, so that a restart costs seconds."""
    cache = tmp_path_factory.mktemp("xla")
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": one_device}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(workdir), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    return workdir


def weights(workdir):
    return (workdir / "hf/final/model.safetensors").read_bytes()


def train_steps(workdir, part):
    rows = [json.loads(line) for line in (workdir / part / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def assert_same_run(workdir, whole):
    for part in ("rounds/000", "rounds/001"):
        mine, theirs = (pq.read_table(run / part / "responses.parquet") for run in (workdir, whole))
        assert mine.equals(theirs), f"{part}: other responses"
    for part in ("sft", "rounds/000", "rounds/001"):
        assert train_steps(workdir, part) == list(range(1, 13)), f"{part}: a step is missing or doubled"
    assert weights(workdir) == weights(whole)


def lines(file):
    return file.read_text().count("\n") if file.exists() else 0


def moments(workdir, chance):
    """When to kill, one moment inside each phase; every condition stays true once it is."""
    first, second = workdir / "rounds/000", workdir / "rounds/001"
    in_sft, in_first, in_second = (chance.randint(1, 11) for _ in range(3))
    return [
        lambda: lines(workdir / "sft/metrics.jsonl") >= in_sft,
        lambda: any(first.glob("responses/*.parquet")) or (first / "responses.parquet").exists(),
        lambda: any(first.glob("scores/*.parts/*.npy")) or any(first.glob("scores/*.npz")),
        lambda: lines(first / "metrics.jsonl") >= in_first,
        lambda: lines(second / "metrics.jsonl") >= in_second,
        lambda: (second / "evaluation.json").exists(),
    ]


def test_killed_at_random_it_ends_with_the_same_parameters(tmp_path, environment, uninterrupted):
    chance, workdir, kills = random.Random(0), tmp_path / "run", 0
    for reached in moments(workdir, chance):
        with subprocess.Popen(
            command(workdir), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and not reached():
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
    assert kills >= 4  # the last phases take milliseconds, a fast machine may be through them
    last = subprocess.run(command(workdir), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert last.returncode == 0, last.stderr
    assert_same_run(workdir, uninterrupted)


def test_signals_save_and_exit_75(tmp_path, environment, uninterrupted):
    workdir = tmp_path / "run"
    stopped = []
    for part, numbers in [
        ("sft", [signal.SIGINT]),
        ("rounds/000", [signal.SIGTERM, signal.SIGHUP]),  # as systemd sends them when a host shuts down
    ]:
        metrics = workdir / part / "metrics.jsonl"
        process = subprocess.Popen(
            command(workdir), cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 200
        while lines(metrics) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        for number in numbers:
            process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 75, errors
        assert "run the same command" in errors
        assert all(f"{done} already done" in errors for done in stopped)
        stopped.append(len(train_steps(workdir, part)))
        assert 2 <= stopped[-1] < 12  # it stopped inside the part...
    again = subprocess.run(command(workdir), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert f"{stopped[-1]} already done" in again.stderr  # ...and repeated none of its steps
    assert_same_run(workdir, uninterrupted)


def test_a_finished_run_computes_nothing_again(tmp_path, environment, uninterrupted):
    whole = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in (whole / "rounds").rglob("*") if path.is_file()}
    again = subprocess.run(command(whole), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stderr and "sampling" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "rounds").rglob("*") if path.is_file()}


def test_killed_after_the_commit_it_needs_no_older_player(environment, uninterrupted):
    """With window=1 committing θ_{t+1} drops θ_t; a kill before the summary must not ask for it again."""
    whole = uninterrupted
    before = weights(whole)
    (whole / "rounds/001/summary.json").unlink()
    shutil.rmtree(whole / "checkpoints/players/1")
    again = subprocess.run(command(whole), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stderr
    assert (whole / "rounds/001/summary.json").exists() and weights(whole) == before


def test_another_config_in_the_same_workdir_is_refused_by_name(environment, uninterrupted):
    whole = uninterrupted
    other = subprocess.run(
        command(whole, "--config.loss.eta=3"), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert other.returncode == 1
    assert "config.loss.eta is 6.0 there and 3.0 here" in other.stderr
    assert other.stderr.count("\n") == 1
