"""Several real processes with gloo between them: what they agree on, and how they stop and die."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from jobs import ROOT, codes, job, text, variables, wait_until

from selfplay_jax import distributed, main
from selfplay_jax.groups import pack


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
        assert not answer["cache"]  # the lead alone would find its programs there
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
