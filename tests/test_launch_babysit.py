"""launch/babysit.sh against a simulated Cloud TPU service: what is retried, how often, and what ends it."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from fake_cloud import HOSTILE, FakeCloud, wait_for

CONFIG = ("--", "--config=configs/tpaw.py")
MakeCloud = Callable[..., FakeCloud]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Iterator[MakeCloud]:
    made: list[FakeCloud] = []

    def make(**options: object) -> FakeCloud:
        made.append(FakeCloud(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def creations(tpu: FakeCloud) -> int:
    return len(tpu.find("queued-resources", "create"))


def deletions(tpu: FakeCloud) -> int:
    return len(tpu.find("queued-resources", "delete"))


def starts(tpu: FakeCloud) -> int:
    return len(tpu.find("worker.sh start"))


def test_undisturbed(cloud: MakeCloud) -> None:
    tpu = cloud()
    done = tpu.run("babysit.sh", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 1, 1)
    assert "preemption" not in done.stderr and "failure" not in done.stderr


def test_preempted_in_every_phase_the_same_run_goes_on(cloud: MakeCloud) -> None:
    """In the queue, during the installation, during the run: none of it counts as a failure."""
    lives = [{"waiting": ["WAITING_FOR_RESOURCES", "SUSPENDED"]}, {"lost": "install"}, {"lost": "run:3"}, {}]
    tpu = cloud(lives=lives, codes="hang\n0")
    run_id = f"--run-id={HOSTILE}"
    done = tpu.run("babysit.sh", "--spot", "--max-failures=0", "--max-preemptions=3", run_id, *CONFIG)
    assert done.returncode == 0, done.stderr
    assert (creations(tpu), deletions(tpu)) == (4, 4)
    assert all("--spot" in call for call in tpu.find("queued-resources", "create"))
    assert [f"preemption {number} (at most 3)" in done.stderr for number in (1, 2, 3)] == [True] * 3
    assert tpu.argv(start=1) == tpu.argv(start=2)
    assert tpu.argv(start=2)[2] == f"--workdir=gs://bucket/runs/{HOSTILE}"


def test_preemption_budget(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"lost": "run:2"}], codes="hang")
    done = tpu.run("babysit.sh", "--max-preemptions=2", *CONFIG)
    assert done.returncode == 75 and "preempted 3 times: giving up" in done.stderr
    assert (creations(tpu), deletions(tpu)) == (3, 3)


def test_again_on_a_healthy_slice_starts_where_it_is(cloud: MakeCloud) -> None:
    tpu = cloud(codes="75 0\n76 75\n0")
    done = tpu.run("babysit.sh", "--max-failures=0", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 3, 1)
    assert len(tpu.find("worker.sh install")) == 1


def test_failure_budget(cloud: MakeCloud) -> None:
    tpu = cloud(codes="139 76")
    done = tpu.run("babysit.sh", "--max-failures=2", "--max-preemptions=0", *CONFIG)
    assert done.returncode == 139 and "failure 3 with code 139: giving up" in done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 3, 1)


def test_a_dead_peer_on_a_healthy_slice_is_a_failure(cloud: MakeCloud) -> None:
    done = cloud(codes="76").run("babysit.sh", "--max-failures=0", *CONFIG)
    assert done.returncode == 76 and "failure 1 with code 76" in done.stderr


def test_a_failing_installation_uses_the_failure_budget_on_one_slice(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"install": 1}])
    done = tpu.run("babysit.sh", "--max-failures=1", "--max-preemptions=0", *CONFIG)
    assert done.returncode == 69 and "failure 2 with code 69" in done.stderr
    assert (creations(tpu), deletions(tpu)) == (1, 1)


def test_the_budgets_are_apart(cloud: MakeCloud) -> None:
    """Two failures and two preemptions fit into budgets of two each."""
    tpu = cloud(lives=[{"lost": "install"}, {}], codes="139\n75\n3\n0")
    done = tpu.run("babysit.sh", "--max-failures=2", "--max-preemptions=2", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert "preemption 2 (at most 2)" in done.stderr and "failure 2 (at most 2)" in done.stderr


def test_a_users_error_is_final(cloud: MakeCloud) -> None:
    tpu = cloud(codes="1 76")
    done = tpu.run("babysit.sh", *CONFIG)
    assert done.returncode == 1 and "no other try would help" in done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 1, 1)


def test_wrong_options_touch_nothing(cloud: MakeCloud) -> None:
    tpu = cloud()
    for words in (["--zone=", *CONFIG], ["--max-failures=many", *CONFIG], ["--flavour=x", *CONFIG], []):
        done = tpu.run("babysit.sh", *words)
        assert done.returncode == 64 and "error: " in done.stderr, words
    assert not tpu.calls


def test_a_slice_that_does_not_answer_is_replaced(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"deaf": 99}, {}])
    done = tpu.run("babysit.sh", "--unreachable=2", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert (creations(tpu), deletions(tpu)) == (2, 2)


def test_its_own_lost_network_is_no_failure(cloud: MakeCloud) -> None:
    """During the run, and again at the question for the slice's health."""
    lost = "ERROR: (gcloud) Unable to find the server at tpu.googleapis.com"
    tpu = cloud(lives=[{"offline": [2, 12, lost]}], codes="75\n0")
    done = tpu.run("babysit.sh", "--max-failures=0", "--unreachable=0", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert "nothing is counted or deleted" in done.stderr and "Unable to find the server" in done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 2, 1)


def test_a_login_that_ends_before_the_slice_is_asked_for(cloud: MakeCloud) -> None:
    tpu = cloud()
    why = "ERROR: You do not currently have an active account selected. Please run: gcloud auth login"
    (tpu.dir / "state.json").write_text(json.dumps({"life": -1, "exists": False, "offline": [8, why]}))
    done = tpu.run("babysit.sh", "--max-failures=0", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert 'run "gcloud auth login" on this machine' in done.stderr
    assert (creations(tpu), starts(tpu), deletions(tpu)) == (1, 1, 1)


def test_a_good_run_sets_the_count_of_failures_back(cloud: MakeCloud) -> None:
    tpu = cloud(codes="139\n139\n139\n0")
    done = tpu.run("babysit.sh", "--max-failures=1", "--good-run=0", *CONFIG)
    assert done.returncode == 0 and done.stderr.count("failure 1 (at most 1)") == 3, done.stderr


def test_a_request_that_cannot_succeed_uses_the_failure_budget(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"waiting": ["ACCEPTED", "FAILED"], "message": "no such type in this zone"}])
    done = tpu.run("babysit.sh", "--max-failures=1", "--max-preemptions=0", *CONFIG)
    assert done.returncode == 69 and "failure 2 with code 69" in done.stderr and "no such type" in done.stderr
    assert (creations(tpu), deletions(tpu)) == (2, 2)


def test_a_queued_request_outlives_a_babysit_that_fails(cloud: MakeCloud) -> None:
    """A wait that was killed is taken up again; the place in the queue stays."""
    tpu = cloud(lives=[{"waiting": ["WAITING_FOR_RESOURCES"] * 40 + ["ACTIVE"]}])
    babysit = subprocess.Popen(
        tpu.command("babysit.sh", *CONFIG), env=tpu.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: bool(tpu.find("queued-resources", "describe", "state.state")) and creations(tpu) == 1)
    time.sleep(0.3)
    children = pathlib.Path(f"/proc/{babysit.pid}/task/{babysit.pid}/children").read_text().split()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)
    _, errors = babysit.communicate(timeout=60)
    assert babysit.returncode == 0 and b"the slice is waiting" in errors, errors
    assert (creations(tpu), deletions(tpu)) == (1, 1)


def test_the_code_is_that_of_the_start(cloud: MakeCloud) -> None:
    """What changes in the checkout during the run is not installed on the next slice."""
    tpu = cloud(lives=[{"lost": "end"}, {}], codes="hang\n0")
    (tpu.repo / "launch/README.md").write_text("at the start\n")
    babysit = subprocess.Popen(tpu.command("babysit.sh", "--keep", *CONFIG), env=tpu.environment())
    tpu.await_program()
    (tpu.repo / "launch/README.md").write_text("later\n")
    assert tpu.run("tpu_vm.sh", "stop").returncode == 0
    assert babysit.wait(60) == 0
    assert creations(tpu) == 2
    assert (tpu.dir / "vms/w1/selfplay_jax/launch/README.md").read_text() == "at the start\n"
    assert not list(tpu.dir.glob("selfplay_jax.*"))


def test_no_capacity_in_time_asks_again(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"waiting": ["WAITING_FOR_RESOURCES"]}, {}])
    done = tpu.run("babysit.sh", "--wait-timeout=1", *CONFIG)
    assert done.returncode == 0, done.stderr
    assert (creations(tpu), deletions(tpu)) == (2, 2)
    assert "--valid-until-duration=1s" in tpu.find("queued-resources", "create")[0]


def test_picks_up_what_it_finds(cloud: MakeCloud) -> None:
    """A second babysit, with the run in progress: no other slice, no other start."""
    tpu = cloud(codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    babysit = subprocess.Popen(
        tpu.command("babysit.sh", "--keep", *CONFIG), env=tpu.environment(), stderr=subprocess.PIPE
    )
    wait_for(lambda: starts(tpu) == 2)
    assert tpu.run("tpu_vm.sh", "stop").returncode == 0
    _, errors = babysit.communicate(timeout=60)
    assert babysit.returncode == 75 and b"stopped on request" in errors and b"the slice was kept" in errors
    assert creations(tpu) == 1 and deletions(tpu) == 0 and not (tpu.dir / "argv.0.2").exists()


def group_lives(group: int) -> bool:
    """Whether a process group has processes that are not merely waiting to be reaped."""
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_babysit_and_not_the_run(cloud: MakeCloud, number: signal.Signals, code: int) -> None:
    tpu = cloud(codes="hang")
    command = [word.replace("--poll=0.05", "--poll=300") for word in tpu.command("babysit.sh", *CONFIG)]
    babysit = subprocess.Popen(
        command,
        env=tpu.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    tpu.await_program()
    wait_for(lambda: bool(tpu.find("worker.sh status")))
    time.sleep(0.2)
    babysit.send_signal(number)
    output, errors = babysit.communicate(timeout=30)
    assert babysit.returncode == code
    assert "slice demo: ACTIVE" in output and output.count(" running ") == 2
    assert "ends the run" in errors and "the costs" in errors
    assert deletions(tpu) == 0
    wait_for(lambda: not group_lives(babysit.pid))


def test_a_signal_during_a_pause(cloud: MakeCloud) -> None:
    tpu = cloud(codes="139")
    command = [word.replace("--backoff=0.01", "--backoff=300") for word in tpu.command("babysit.sh", *CONFIG)]
    babysit = subprocess.Popen(
        command, env=tpu.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert babysit.stderr
    for line in babysit.stderr:
        if "next try in" in line:
            break
    time.sleep(0.2)
    babysit.send_signal(signal.SIGTERM)
    assert babysit.wait(30) == 143


def test_dry_run_prints_the_plan(cloud: MakeCloud) -> None:
    tpu = cloud()
    done = tpu.run(
        "babysit.sh", "--dry-run", f"--run-id={HOSTILE}", "--secret=HF_TOKEN=tok", *CONFIG, HF_TOKEN="sentinel"
    )
    assert done.returncode == 0 and not tpu.calls
    verbs = [
        "create demo",
        "describe demo",
        "git",
        "scp",
        "worker.sh\\ install",
        "worker.sh\\ start",
        "until the program has ended",
        "delete demo",
    ]
    places = [done.stdout.index(verb) for verb in verbs]
    assert places == sorted(places) and "sentinel" not in done.stdout + done.stderr
