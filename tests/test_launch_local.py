"""launch/local.sh: real processes, real signals, a stand-in for the program."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from fake_cloud import HOSTILE, ROOT, STUBS

LOCAL = str(ROOT / "launch/local.sh")
STUB = f"--program={shlex.quote(sys.executable)} {shlex.quote(str(STUBS / 'process.py'))}"


def start(tmp_path: pathlib.Path, play: str, *options: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PLAY": play, "NOTES": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [LOCAL, "-n", str(len(play.split())), STUB, *options]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def notes(tmp_path: pathlib.Path, n: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"{i}.json").exists() for i in range(n)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(n)]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "Z" in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_every_process_gets_its_number_and_the_same_arguments(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "0 0 0", "--devices-per-process=2", "--", "--config=c.py", HOSTILE, "")
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    got = notes(tmp_path, 3)
    port = got[0]["argv"][0]
    assert port.startswith("--coordinator=localhost:")
    for i, note in enumerate(got):
        assert note["argv"] == [port, "--num_processes=3", f"--process_id={i}", "--config=c.py", HOSTILE, ""]
        assert note["env"]["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=2")
        assert note["env"]["JAX_PLATFORMS"] == "cpu"
        for line in ("first line", "and $(more) \\n of it", "an error"):
            assert f"[{i}] {line}\n" in output
    assert not list(tmp_path.glob("selfplay_jax.*"))


def test_gpus_are_shared_out(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "0 0", "--gpus=4", "--port=4321", "--", "--config=c.py")
    assert run.wait(60) == 0
    assert [note["env"]["CUDA_VISIBLE_DEVICES"] for note in notes(tmp_path, 2)] == ["0,1", "2,3"]
    assert notes(tmp_path, 2)[0]["argv"][0] == "--coordinator=localhost:4321"


@pytest.mark.parametrize(
    ("play", "code"),
    [
        ("0 0", 0),
        ("75 75", 75),
        ("0 75", 75),
        ("0 3", 3),
        ("75 4", 4),
        ("76 9 76", 9),
        ("crash save", 134),
        ("1 save", 1),
    ],
)
def test_exit_code(tmp_path: pathlib.Path, play: str, code: int) -> None:
    run = start(tmp_path, play, "--settle=30", "--", "--config=c.py")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == code, errors
    assert code == 0 or f"ended with code {code}\n" in errors


def test_again_ends_those_that_do_not_end_by_themselves(tmp_path: pathlib.Path) -> None:
    """Told to end by local.sh, the other dies of SIGTERM: that is no failure."""
    run = start(tmp_path, "75 wait", "--settle=0", "--", "--config=c.py")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 75 and "process 1 ended with code 143" in errors


def test_one_that_dies_takes_the_others_down(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "save parent 5", "--grace=5", "--", "--config=c.py")
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 5
    assert errors.index("process 2 ended with code 5") < errors.index("telling the 2 others to end; they have 5 s")
    assert "process 0 ended with code 75" in errors and "[0] saving\n[0] saved\n" in output
    assert "killing the 1 that are left" in errors and "process 1 ended with code 137" in errors
    assert gone(notes(tmp_path, 3)[1]["child"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_everybody_saves(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    run = start(tmp_path, "save save", "--", "--config=c.py")
    notes(tmp_path, 2)
    run.send_signal(number)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 75, errors
    assert "[0] saved\n" in output and "[1] saved\n" in output


def test_a_second_signal_kills(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "deaf deaf", "--", "--config=c.py")
    pids = [note["pid"] for note in notes(tmp_path, 2)]
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 137
    assert all(gone(pid) for pid in pids)


def test_dry_run_prints_what_would_be_run(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "0 0", "--dry-run", "--devices-per-process=2", "--", "--config=c.py", HOSTILE)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and not list(tmp_path.iterdir())
    env = {**os.environ, "PLAY": "0 0", "NOTES": str(tmp_path)}
    subprocess.run(["bash", "-c", printed.replace("\n", " &\n") + "wait"], env=env, check=True, timeout=60)
    assert [note["argv"][2:] for note in notes(tmp_path, 2)] == [
        [f"--process_id={i}", "--config=c.py", HOSTILE] for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--", "x"], "-n is missing"),
        (["-n", "two"], "is no whole number"),
        (["-n", "0"], "at least one process"),
        (["-n", "3", "--gpus=4"], "cannot be shared out among 3"),
        (["-n", "2", "--config=c.py"], "what goes to the program comes after --"),
    ],
)
def test_wrong_options_are_one_sentence(words: list[str], sentence: str) -> None:
    done = subprocess.run([LOCAL, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 64 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
