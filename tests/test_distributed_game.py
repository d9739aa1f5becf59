"""Several real processes with gloo between them play the game that one process plays, whoever dies or is stopped."""

import contextlib
import json
import signal
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from jobs import codes, job, text, variables, wait_until

# The game. eps is large: with a small one Adam's first steps follow the sign of a gradient, and so its rounding.

_GAME = [
    "--config=configs/tpaw.py", "--config.rounds=2", "--config.data.examples=24", "--config.data.test_examples=9",
    "--config.data.validation_examples=8", "--config.samples_per_prompt=2", "--config.opponents_per_prompt=1",
    "--config.sft.epochs=2", "--config.sft.batch_size=8", "--config.sft.learning_rate=3e-3",
    "--config.train.epochs=2", "--config.train.batch_size=8", "--config.train.learning_rate=1e-3",
    "--config.train.eps=1e-2", "--config.loss.lam=1", "--config.train.checkpoint_every=2", "--config.sampling.chunk=6",
    "--config.sampling.slots=8", "--config.scoring.chunk=12", "--config.scoring.batch_size=8",
    "--config.evaluation.samples_per_prompt=1", "--config.evaluation.run=sampled,likelihood",
    "--config.evaluation.batch_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Compiled programs, for all processes of this module."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla"))}


@contextlib.contextmanager
def game(workdir, count, devices, folder, caches, *more):
    folder.mkdir(exist_ok=True)

    def command(port, index):
        arguments = [*_GAME, f"--workdir={workdir}", *more]
        if count > 1:
            arguments += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"]
        return [sys.executable, "-m", "selfplay_jax.main", *arguments]

    with job(command, range(count), folder, env=variables(devices, **caches)) as processes:
        yield processes


def play(workdir, count, devices, folder, caches, *more):
    with game(workdir, count, devices, folder, caches, *more) as processes:
        assert codes(processes, 400) == [0] * count, "\n".join(text(folder, "err", i)[-2000:] for i in range(count))


@pytest.fixture(scope="module")
def single(tmp_path_factory, caches):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    play(workdir, 1, 4, tmp_path_factory.mktemp("log"), caches)
    return workdir


def steps_of(workdir, part):
    file = workdir / part / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if row["kind"] == "train"]


def assert_same_run(workdir, single):
    for part in ("rounds/000", "rounds/001"):
        mine, theirs = (pq.read_table(run / part / "responses.parquet") for run in (workdir, single))
        for column in ("id", "sample", "prompt", "response", "tokens", "finished"):
            assert mine[column].equals(theirs[column]), f"{part}: other responses ({column})"
        scores, others = (
            {file.name: np.load(file) for file in sorted((run / part / "scores").iterdir())}
            for run in (workdir, single)
        )
        assert list(scores) == list(others)
        for name in scores:
            for key in scores[name]:
                np.testing.assert_allclose(scores[name][key], others[name][key], atol=1e-3)
    for part in ("sft", "rounds/000", "rounds/001"):
        assert steps_of(workdir, part) == list(range(1, 7)), f"{part}: a step is missing or doubled"
    mine, theirs = (safetensors.numpy.load_file(run / "hf/final/model.safetensors") for run in (workdir, single))
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, err_msg=name)
    files, others = (
        {str(path.relative_to(run / "hf")) for path in (run / "hf").rglob("*")} for run in (workdir, single)
    )
    assert files == others


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_play_the_game_of_one(tmp_path, caches, single, count):
    workdir = tmp_path / "run"
    play(workdir, count, 2, tmp_path / "log", caches)
    assert_same_run(workdir, single)


def lines(file):
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on_with_other_processes_and_meshes(tmp_path, caches, single):
    workdir = tmp_path / "run"
    first, second = workdir / "rounds/000", workdir / "rounds/001"
    with game(workdir, 2, 2, tmp_path / "a", caches) as processes:  # process 1 dies in the warm-up
        wait_until(lambda: lines(workdir / "sft/metrics.jsonl") >= 3, processes)
        processes[1].kill()
        began = time.monotonic()
        assert codes(processes[:1], 60) == [76]
        assert time.monotonic() - began < 40
    assert "process 1 of 2 died" in text(tmp_path / "a", "err", 0).splitlines()[-1]

    with game(workdir, 2, 2, tmp_path / "s", caches) as processes:  # both are preempted as they sample
        wait_until(lambda: any(first.glob("responses/*.parquet")), processes)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert codes(processes, 60) == [75, 75], text(tmp_path / "s", "err", 0)
    assert "already done" in text(tmp_path / "s", "err", 0)  # of the warm-up

    with game(workdir, 2, 2, tmp_path / "b", caches) as processes:  # process 1 is preempted
        wait_until(lambda: lines(first / "metrics.jsonl") >= 1, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert codes(processes, 60) == [75, 75], text(tmp_path / "b", "err", 0)
    assert "training SFT" not in text(tmp_path / "b", "err", 0)
    done = len(steps_of(workdir, "rounds/000"))
    assert 1 <= done <= 6

    # The tensor axis lies across processes, so that they sample together; the lead dies meanwhile. What is computed at
    # a time may change too.
    with game(workdir, 4, 1, tmp_path / "c", caches, "--config.mesh.fsdp=1", "--config.mesh.tensor=2",
              "--config.mesh.replica=2", "--config.train.accumulate=2", "--config.sampling.chunk=5",
              "--config.sampling.slots=4", "--config.scoring.batch_size=4") as processes:  # fmt: skip
        wait_until(lambda: any(second.glob("responses/*.parquet")) or lines(second / "metrics.jsonl"), processes)
        processes[0].kill()
        assert codes(processes[1:], 60) == [76, 76, 76]
    if done < 6:  # else the round was over before all had heard
        assert f"{done} already done" in text(tmp_path / "c", "err", 0)
    for index in (1, 2, 3):
        assert "process 0 of 4 died" in text(tmp_path / "c", "err", index).splitlines()[-1]

    play(workdir, 1, 4, tmp_path / "d", caches)
    assert_same_run(workdir, single)
