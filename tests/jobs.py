"""Several processes of one job on this machine, for tests."""

import contextlib
import os
import pathlib
import socket
import subprocess
import time

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
