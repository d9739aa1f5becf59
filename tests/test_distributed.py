"""Several real processes with gloo between them: what they agree on, how they stop and die, and that they play the game
that one process plays."""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from selfplay_jax import distributed, environment, main, rendezvous
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.groups import pack

ROOT = pathlib.Path(__file__).resolve().parents[1]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def variables(devices, **more):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


@contextlib.contextmanager
def job(command, indices, folder, **options):
    """Starts `command(port, index)` for these processes; whatever still runs at the end is killed."""
    port, processes = free_port(), []
    try:
        for index in indices:
            files = [(folder / f"{name}_{index}.txt").open("w") for name in ("out", "err")]
            processes.append(
                subprocess.Popen(command(port, index), stdout=files[0], stderr=files[1], cwd=ROOT, **options)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def text(folder, name, index):
    return (folder / f"{name}_{index}.txt").read_text()


def wait_until(reached, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it was never reached"
        assert all(process.poll() is None for process in processes), [p.poll() for p in processes]
        time.sleep(0.005)


def codes(processes, seconds=240):
    deadline = time.monotonic() + seconds
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


# Without a game


@contextlib.contextmanager
def small_job(task, count, folder, *more, present=None, patience=60):
    """`present`: which of the processes come at all."""
    present = range(count) if present is None else present

    def command(port, index):
        numbers = [str(port), str(count), str(index)]
        return [sys.executable, str(ROOT / "tests/distributed_worker.py"), task, *numbers, str(folder), *more]

    with job(command, present, folder, env=variables(2, PATIENCE=str(patience))) as processes:
        yield processes


def said(folder, index):
    return [json.loads(line) for line in text(folder, "out", index).splitlines() if line.startswith("{")]


def ready(folder, count):
    return lambda: all({"ready": True} in said(folder, index) for index in range(count))


def started(folder, *indices):
    return lambda: all({"started": True} in said(folder, index) for index in indices)


def test_they_agree_and_share(tmp_path):
    with small_job("agree", 2, tmp_path) as processes:
        assert codes(processes) == [0, 0]
    first, second = (said(tmp_path, index)[-1] for index in range(2))
    assert (first["made"], second["made"]) == (1, 0)  # the lead alone decides
    for answer in (first, second):
        assert answer["list"] == [1, 2.5, None] and answer["nan"] == "nan" and answer["nested"] == "inside"
        assert answer["raised"] == "the lead cannot" and answer["stopped"] == "stopped"
        assert answer["gathered"] == [0, 1] and answer["host"] and answer["here"]
        assert answer["total"] == np.arange(24).sum()
        assert answer["local"] == {"replica": 1, "fsdp": 2, "tensor": 1}
        assert answer["across"] == {"replica": 1, "fsdp": 1, "tensor": 4}  # it lies across: nobody is alone
    assert (first["mine"], second["mine"]) == ([0, 2, 4], [1, 3]) and (first["each"], second["each"]) == (0, 1)
    assert first["own"] == [True] * 4 + [False] * 4 and second["own"] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("own", [False, True])
def test_tokens_are_kept_once_where_the_folder_is_shared(tmp_path, own):
    with small_job("tokens", 2, tmp_path, *(["own"] if own else [])) as processes:
        assert codes(processes) == [0, 0], text(tmp_path, "err", 1)
    written = [said(tmp_path, index)[-1]["written"] for index in range(2)]
    assert written == [1, 1 if own else 0]  # the lead writes; the other does where it cannot see what the lead wrote
    assert all(said(tmp_path, index)[-1]["tokens"] == said(tmp_path, 0)[-1]["tokens"] for index in range(2))


@pytest.mark.parametrize(("number", "whom"), [
    (signal.SIGTERM, (0,)), (signal.SIGTERM, (1,)), (signal.SIGTERM, (0, 1)), (signal.SIGINT, (0, 1)),
])  # fmt: skip
def test_a_signal_to_some_stops_all_at_the_same_step(tmp_path, number, whom):
    with small_job("steps", 2, tmp_path) as processes:
        wait_until(ready(tmp_path, 2), processes)
        for index in whom:
            processes[index].send_signal(number)
        assert codes(processes, 60) == [75, 75], text(tmp_path, "err", 0)
    stopped = [said(tmp_path, index)[-1]["stopped"] for index in range(2)]
    assert stopped[0] == stopped[1] > 3


def test_a_signal_to_one_stops_all_while_each_works_alone(tmp_path):
    with small_job("apart", 3, tmp_path) as processes:
        wait_until(ready(tmp_path, 3), processes)
        processes[2].send_signal(signal.SIGTERM)
        assert codes(processes, 60) == [75, 75, 75]


@pytest.mark.parametrize(("where", "number"), [("each", signal.SIGTERM), ("agree", signal.SIGINT)])
def test_a_signal_to_one_that_waits_in_the_runtime_stops_all(tmp_path, where, number):
    """It has nothing to do, and its main thread is in C++: Python's handlers do not run there."""
    with small_job("idle", 2, tmp_path, where) as processes:
        wait_until(ready(tmp_path, 2), processes)
        time.sleep(0.5)  # from saying so to waiting
        processes[1].send_signal(number)
        assert codes(processes, 20) == [75, 75]
    assert text(tmp_path, "err", 1).count("stopping at the next safe point") == 1


# Before they have met


def test_a_signal_while_they_wait_for_one_that_does_not_come(tmp_path):
    with small_job("agree", 3, tmp_path, present=(0, 2)) as processes:
        wait_until(started(tmp_path, 0, 2), processes)
        time.sleep(1.0)  # now they have met
        processes[1].send_signal(signal.SIGTERM)
        assert codes(processes, 20) == [75, 75]


def test_a_signal_while_there_is_no_process_0(tmp_path):
    with small_job("agree", 2, tmp_path, present=(1,)) as processes:
        wait_until(started(tmp_path, 1), processes)
        processes[0].send_signal(signal.SIGTERM)
        assert codes(processes, 20) == [75]


def test_who_never_came_is_named(tmp_path):
    with small_job("agree", 4, tmp_path, present=(0, 2), patience=2) as processes:
        assert codes(processes, 60) == [76, 76]
    for index in (0, 2):  # whichever came later
        (only,) = text(tmp_path, "err", index).splitlines()  # and no stack
        assert only.startswith("processes 1, 3 of 4 never came (waited 2 s)")


def test_a_process_0_that_never_came_is_named(tmp_path):
    with small_job("agree", 2, tmp_path, present=(1,), patience=1) as processes:
        assert codes(processes, 60) == [76]
    (only,) = text(tmp_path, "err", 1).splitlines()
    assert only.startswith("process 0 of 2 never came (waited 1 s, 127.0.0.1:") and "Connection refused" in only


@contextlib.contextmanager
def meeting(count):
    """Calls `meet` in threads: a function that starts one, and what became of each."""
    ends, threads, port = {}, [], free_port()

    def come(index, count=count, asked=lambda: False, name=None):
        def work():
            try:
                rendezvous.meet(f"localhost:{port}", index, count, asked, 30.0)
                ends[name or index] = "met"
            except (UserError, Stopped) as error:
                ends[name or index] = error

        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()

    yield come, ends, port
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()


def test_they_meet_in_any_order_and_leave_the_port_free():
    with meeting(4) as (come, ends, port):
        for index in (3, 1, 0):
            come(index)
            time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port)) as stranger:  # a health check, another program
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        assert not ends
        come(2)
    assert ends == dict.fromkeys(range(4), "met")
    socket.create_server(("", port)).close()


def test_one_that_left_while_they_waited_is_waited_for_again():
    with meeting(3) as (come, ends, port):
        come(0)
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as killed:
            killed.sendall(b'{"process": 1, "count": 3}\n')
            assert killed.recv(100) == b'{"welcome": true}\n'
        come(2)
        time.sleep(0.5)
        assert not ends
        come(1)
    assert ends == dict.fromkeys(range(3), "met")


def test_processes_that_count_each_other_differently_are_told():
    with meeting(3) as (come, ends, _):
        come(0)
        come(1)
        time.sleep(0.5)
        come(2, count=4)
    assert all(isinstance(error, UserError) for error in ends.values()) and len(ends) == 3
    assert {str(error).split(":")[0] for error in ends.values()} == {
        "process 2 was told of 4 processes, process 0 of 3"
    }


def test_a_number_given_twice_is_told():
    with meeting(3) as (come, ends, _):
        come(0)
        come(1, name="older")
        time.sleep(0.5)
        come(1, name="newer")
        time.sleep(0.5)
        assert list(ends) == ["older"] and "--process_id=1" in str(ends["older"])
        come(2)
    assert [ends[name] for name in (0, "newer", 2)] == ["met"] * 3


@pytest.mark.parametrize("who", [0, 2])
def test_a_wish_to_stop_while_they_wait_reaches_all_that_are_there(who):
    asked = threading.Event()
    with meeting(4) as (come, ends, _):
        for index in (0, 1, 2):
            come(index, asked=asked.is_set if index == who else lambda: False)
        time.sleep(0.5)
        assert not ends
        asked.set()
    assert [type(ends[index]) for index in (0, 1, 2)] == [Stopped] * 3


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_that_is_taken_is_said(family):
    with socket.create_server(("", 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on port {port} \(.*in use.*--coordinator=HOST:PORT"):
            distributed.initialise(coordinator=f"localhost:{port}", num_processes=2, process_id=0)


# What a signal does to a process whose main thread is in C


_STUCK = """
import ctypes, os, signal, sys, threading, time
from selfplay_jax import main
signals, lock, libc = main.Signals(), ctypes.create_string_buffer(64), ctypes.CDLL(None)
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.5)
os.kill(child, signal.SIGTERM)  # its own affair, though it has the same handlers
time.sleep(0.5)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print("ready" if not signals.asked else "told of the child's", flush=True)

def tell():
    while not signals.asked:
        time.sleep(0.01)
    print("asked", flush=True)

threading.Thread(target=tell, daemon=True).start()
libc.pthread_mutex_lock(lock)
libc.pthread_mutex_lock(lock)
"""


def test_a_process_stuck_in_c_hears_signals_and_a_second_ctrl_c_ends_it():
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 75
    assert "run the same command to go on" in errors.splitlines()[-1] and "Traceback" not in errors


# Deaths and errors


@pytest.mark.parametrize("task", ["wait", "steps"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_takes_the_others_down_by_name(tmp_path, task, victim):
    with small_job(task, 3, tmp_path) as processes:
        wait_until(ready(tmp_path, 3), processes)
        processes[victim].kill()
        others = [index for index in range(3) if index != victim]
        assert codes([processes[index] for index in others], 60) == [76, 76]
    for index in others:
        last = text(tmp_path, "err", index).splitlines()[-1]
        assert last.startswith(f"process {victim} of 3 died (") and last.endswith(
            "run the same command on all to go on"
        )
        assert "Traceback" not in text(tmp_path, "err", index)


@pytest.mark.parametrize(("task", "ends", "sentence"), [
    ("error", (1, 1), "process 1 of 3 ended: the disk of this host is full"),
    ("bug", (70, 76), "process 1 of 3 failed (KeyError: 'no such thing'); the job ends"),
])  # fmt: skip
def test_an_error_of_one_ends_the_others_with_its_reason(tmp_path, task, ends, sentence):
    own, others = ends
    with small_job(task, 3, tmp_path) as processes:
        assert codes(processes, 100) == [others, own, others]
    assert all(text(tmp_path, "err", index).splitlines()[-1].startswith(sentence) for index in (0, 2))
    assert ("Traceback" in text(tmp_path, "err", 1)) == (task == "bug")


@pytest.mark.parametrize(("told", "count"), [
    ({}, 1),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, 2),
    ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, 2),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 1),  # a batch script's own shell
    ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
])  # fmt: skip
def test_what_the_environment_tells(monkeypatch, told, count):
    for name in list(os.environ):
        if name.startswith(("TPU_", "SLURM_", "OMPI_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert environment.processes() == count


def test_what_a_tpu_vm_tells_of_its_slices():
    """A metadata server like Google's, with two slices of four hosts."""
    told = {"worker-network-endpoints": "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            known = name in told and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(told.get(name, "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        assert environment.tpu_vm_hosts(address) == 1  # it has no tpu-env: no Cloud TPU
        told["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        assert environment.tpu_vm_hosts(address) == 8
        told["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\n"
        assert environment.tpu_vm_hosts(address) == 4
        server.shutdown()


@pytest.mark.parametrize(("flags", "wrong"), [
    (["--coordinator=host:1234"], "go together"),
    (["--coordinator=host:1234", "--num_processes=2"], "go together"),
    (["--coordinator=host", "--num_processes=2", "--process_id=0"], "--coordinator=host must read HOST:PORT"),
    (["--coordinator=host:0", "--num_processes=2", "--process_id=0"], "--coordinator=host:0 must read HOST:PORT"),
    (["--coordinator=host:12", "--num_processes=2", "--process_id=2"], "--process_id=2 must be below"),
    (["--distributed=maybe"], "--distributed=maybe is not one of auto, on, off"),
])  # fmt: skip
def test_flags_that_cannot_be_are_said(flags, wrong):
    arguments = main.read_job_flags(["--config=configs/spin.py", *flags])
    with pytest.raises(UserError, match=wrong):
        distributed.initialise(**arguments)


def test_one_process_needs_nothing():
    distributed.initialise(**main.read_job_flags(["--config=configs/spin.py"]))
    distributed.initialise(coordinator="host:1", num_processes=1, process_id=0)
    distributed.initialise("off", "host:1", 2, 0)
    assert (distributed.count(), distributed.index(), distributed.is_lead()) == (1, 0, True)
    assert distributed.agree(lambda: (1, 2)) == (1, 2) and distributed.gather("x") == ["x"]
    assert distributed.leave(75) == 75


def test_a_process_packs_its_own_rows_into_the_shapes_of_all():
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[[7], [8, 8]], [[9] * 11, []], [[1], [2]]]
    whole = pack(prompts, responses)
    mine = pack(prompts, responses, own=np.array([False, True, False]))
    for all_rows, own_rows in zip(whole, mine, strict=True):
        assert all_rows.shape == own_rows.shape
        np.testing.assert_array_equal(all_rows[1], own_rows[1])
    np.testing.assert_array_equal(whole.response_lengths, mine.response_lengths)
    np.testing.assert_array_equal(whole.prompt_lengths, mine.prompt_lengths)
    assert not mine.prompt[[0, 2]].any() and not mine.responses[[0, 2]].any()


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
