"""How processes meet before jax connects them, and what tells them of each other."""

import contextlib
import http.server
import os
import socket
import threading
import time

import pytest
from jobs import free_port

from selfplay_jax import distributed, environment, main, rendezvous
from selfplay_jax.errors import Stopped, UserError


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
