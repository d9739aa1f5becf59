"""launch/tpu_vm.sh against a simulated Cloud TPU service."""

import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from fake_cloud import HOSTILE, FakeCloud, script, wait_for

CONFIG = ("--", "--config=configs/tpaw.py")
MakeCloud = Callable[..., FakeCloud]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Iterator[MakeCloud]:
    made: list[FakeCloud] = []

    def make(**options: object) -> FakeCloud:
        made.append(FakeCloud(tmp_path / str(len(made)), **options))  # type: ignore[arg-type]
        return made[-1]

    (tmp_path / "0").mkdir()
    yield make
    for each in made:
        each.close()


def test_from_nothing_to_a_finished_run(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"waiting": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}])
    up = tpu.run("tpu_vm.sh", "up", "--spot")
    assert up.returncode == 0, up.stderr
    (create,) = tpu.find("queued-resources", "create")
    assert {"--node-id=demo", "--spot", "--accelerator-type=v5litepod-16", "--zone=us-west4-a"} <= set(create)
    assert {"--runtime-version=v2-alpha-tpuv5-lite", "--project=my-project"} <= set(create)
    assert [state in up.stderr for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")] == [
        True
    ] * 4
    run = tpu.run("tpu_vm.sh", "run", *CONFIG, "--config.rounds=2")
    assert run.returncode == 0, run.stderr
    wanted = [
        "-m",
        "selfplay_jax.main",
        "--workdir=gs://bucket/runs/demo",
        "--config=configs/tpaw.py",
        "--config.rounds=2",
    ]
    assert tpu.argv(0) == tpu.argv(1) == wanted
    assert "worker 0 start 1" in run.stdout
    assert len(list((tpu.dir / "buckets/bucket/runs/demo/logs").glob("*.log"))) == 2
    assert tpu.run("tpu_vm.sh", "delete").returncode == 0
    assert "--force" in tpu.find("queued-resources", "delete", "demo")[0]
    assert "setup TPU=1" in up.stdout


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5e-16", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_runtime_version_goes_by_generation(cloud: MakeCloud, accelerator: str, runtime: str) -> None:
    shown = cloud().run("tpu_vm.sh", "create", "--dry-run", f"--accelerator-type={accelerator}").stdout
    assert f"--runtime-version={runtime} " in shown
    assert f"--accelerator-type={accelerator.replace('v5e', 'v5litepod')} " in shown


@pytest.mark.parametrize(
    ("agent", "key", "accelerator", "code"),
    [
        ("SHA256:mine", True, "v5litepod-16", 0),
        ("SHA256:other", True, "v5litepod-16", 64),
        ("SHA256:other", False, "v5litepod-16", 64),
        ("SHA256:other", False, "v5litepod-8", 0),
        ("", True, "v5litepod-16", 0),
    ],
)
def test_an_agent_without_gclouds_key_is_found_before_anything_is_paid(
    cloud: MakeCloud, agent: str, key: bool, accelerator: str, code: int
) -> None:
    """Only several workers, and only an agent that holds keys, make gcloud look there."""
    tpu = cloud()
    script(tpu.dir / "bin/ssh-add", f"#!/bin/sh\n[ '{agent}' ] && echo '3072 {agent} me (RSA)'\n")
    script(tpu.dir / "bin/ssh-keygen", '#!/bin/sh\n[ -e "$2" ] && echo "3072 SHA256:mine me (RSA)"\n')
    if key:
        script(tpu.dir / ".ssh/google_compute_engine", "")
    create = tpu.run("tpu_vm.sh", "create", f"--accelerator-type={accelerator}")
    assert create.returncode == code, create.stderr
    assert bool(tpu.find("queued-resources", "create")) == (code == 0) and (
        "does not hold gcloud's key" in create.stderr
    ) == (code != 0)


def test_hostile_words_reach_the_program_as_they_are(cloud: MakeCloud) -> None:
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    arg = f"--config.model.path={HOSTILE}\nsecond line\t$HOME"
    run = tpu.run("tpu_vm.sh", "run", f"--run-id={HOSTILE}", f"--env=NOTE={HOSTILE}", *CONFIG, arg, "", "--", "*")
    assert run.returncode == 0, run.stderr
    for worker in (0, 1):
        assert tpu.argv(worker)[2:] == [f"--workdir=gs://bucket/runs/{HOSTILE}", *CONFIG[1:], arg, "", "--", "*"]
        assert tpu.env(worker)["NOTE"] == HOSTILE


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ("0 0 0", 0),
        ("0 75 0", 75),
        ("76 76 139", 139),
        ("76 75 76", 75),
        ("134 75 134", 75),
        ("76 1 76", 1),
        ("0 76 0", 76),
        ("137 3 0", 137),
    ],
)
def test_exit_code_over_all_workers(cloud: MakeCloud, codes: str, code: int) -> None:
    tpu = cloud(codes=codes, workers=3)
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    run = tpu.run("tpu_vm.sh", "run", *CONFIG)
    assert run.returncode == code, run.stderr
    words = " ".join(f"{worker}:{each}" for worker, each in enumerate(codes.split()))
    assert f"ended (worker:code) {words}\n" in run.stderr


@pytest.mark.parametrize("codes", ["76 76", "1 76", "137 75"])
def test_whatever_the_code_on_a_slice_that_is_gone_it_means_again(cloud: MakeCloud, codes: str) -> None:
    tpu = cloud(lives=[{"lost": "end"}], codes=codes)
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    run = tpu.run("tpu_vm.sh", "run", *CONFIG)
    assert run.returncode == 75 and "demo was taken away" in run.stderr, run.stderr


def test_workers_that_outlive_a_failed_one_are_ended(cloud: MakeCloud) -> None:
    tpu = cloud(codes="stuck 139")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    run = tpu.run("tpu_vm.sh", "run", "--grace=1", *CONFIG)
    assert run.returncode == 139, run.stderr
    assert "worker(s) 0 did not end by themselves" in run.stderr
    deadline = time.monotonic() + 20
    while "running" in tpu.run("tpu_vm.sh", "status").stdout:
        assert time.monotonic() < deadline


def test_stop_saves_and_watch_says_so(cloud: MakeCloud) -> None:
    tpu = cloud(codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).stdout.count("already running") == 2
    status = tpu.run("tpu_vm.sh", "status").stdout
    assert "slice demo: ACTIVE" in status and status.count(" running -") == 2
    assert "nothing is installed over it" in tpu.run("tpu_vm.sh", "up").stderr
    assert tpu.run("tpu_vm.sh", "stop").returncode == 0
    watch = tpu.run("tpu_vm.sh", "watch")
    assert watch.returncode == 77 and "stopped on request" in watch.stderr and "saving" in watch.stdout
    assert "[worker 1] saving" in tpu.run("tpu_vm.sh", "logs").stdout


def test_a_stop_right_after_the_start_is_not_lost(cloud: MakeCloud) -> None:
    """The supervisor passes it on although it came before the program was there."""
    tpu = cloud(codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    assert tpu.run("tpu_vm.sh", "stop").returncode == 0
    assert tpu.run("tpu_vm.sh", "watch").returncode == 77


def test_stop_by_force(cloud: MakeCloud) -> None:
    tpu = cloud(codes="stuck")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    patient = tpu.run("tpu_vm.sh", "stop", "--grace=0")
    assert patient.returncode == 69 and "still running on worker(s) 0 1" in patient.stderr
    assert tpu.run("tpu_vm.sh", "stop", "--grace=0", "--force").returncode == 0
    assert tpu.run("tpu_vm.sh", "watch").returncode == 77


@pytest.mark.parametrize(
    ("life", "command", "code", "sentence"),
    [
        ({"create": 1, "message": "ERROR: Quota exceeded"}, "up", 69, "the slice was not accepted"),
        ({"waiting": ["WAITING_FOR_RESOURCES", "FAILED"], "message": "no such type"}, "up", 69, "FAILED, no such type"),
        ({"waiting": ["FAILED"], "message": "no such type"}, "up --wait-timeout=99", 69, "FAILED, no such type"),
        ({"waiting": ["FAILED"], "made": "2020-01-01T00:00:00.5Z"}, "up --wait-timeout=99", 73, "FAILED"),
        ({"waiting": ["PROVISIONING", "SUSPENDED"]}, "up", 75, "came to nothing: SUSPENDED"),
        ({"waiting": ["WAITING_FOR_RESOURCES"]}, "up --wait-timeout=1", 73, "no capacity within 1 s"),
        ({"lost": "install"}, "up", 75, "taken away during the installation"),
        ({"install": 2}, "up", 69, "the installation failed"),
        ({"lost": "start"}, "run", 75, "taken away before the program started"),
        ({"half": 3}, "run", 69, "could not be started on all workers (code 255, try 3 of 3)"),
        ({"lost": "run:3"}, "run", 75, "taken away"),
        ({"deaf": 99}, "run --unreachable=1", 69, "0 of 2 workers answer since"),
    ],
)
def test_what_goes_wrong_has_a_code_and_a_sentence(
    cloud: MakeCloud, life: dict[str, object], command: str, code: int, sentence: str
) -> None:
    tpu = cloud(lives=[life], codes="hang")
    words = command.split()
    if words[0] == "run":
        assert tpu.run("tpu_vm.sh", "up").returncode == 0
    done = tpu.run("tpu_vm.sh", *words, *CONFIG)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr


def test_a_worker_that_lost_the_program_means_again(cloud: MakeCloud) -> None:
    tpu = cloud(codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    pid = (tpu.dir / "vms/w1/.selfplay_jax/demo/pid").read_text().strip()
    subprocess.run(["kill", "-KILL", "--", f"-{pid}"], check=True)
    watch = tpu.run("tpu_vm.sh", "watch")
    assert watch.returncode == 75 and "gone from worker(s) 1" in watch.stderr


def shut_down(tpu: FakeCloud, worker: int) -> str:
    """What systemd does to the processes of a session when the VM goes down; returns the exit code left behind."""
    state = tpu.dir / f"vms/w{worker}/.selfplay_jax/demo"
    for number in (signal.SIGTERM, signal.SIGHUP):
        os.killpg(int((state / "pid").read_text()), number)
    wait_for((state / "exit_code").exists)
    return (state / "exit_code").read_text()


@pytest.mark.parametrize("play", ["save", "early"])
def test_at_a_shutdown_the_program_saves_and_the_code_says_again(cloud: MakeCloud, play: str) -> None:
    tpu = cloud(codes=play)
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    assert [shut_down(tpu, worker) for worker in (0, 1)] == ["75\n", "75\n"]
    log = (tpu.dir / "vms/w1/.selfplay_jax/demo/log").read_text()
    assert ("saving\nsaved\n" in log) == (play == "save") and "ended with code 75" in log
    assert tpu.run("tpu_vm.sh", "watch").returncode == 75


def test_a_shutdown_while_a_secret_is_read_is_no_error_of_the_users(cloud: MakeCloud) -> None:
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    (tpu.dir / "secrets").mkdir()
    os.mkfifo(tpu.dir / "secrets/slow")
    assert tpu.run("tpu_vm.sh", "start", "--secret=HF_TOKEN=slow", *CONFIG).returncode == 0
    wait_for(lambda: len(tpu.find("secrets", "access")) == 2)
    assert [shut_down(tpu, worker) for worker in (0, 1)] == ["75\n", "75\n"]
    assert not list(tpu.dir.glob("argv.*"))


def test_a_start_that_reached_some_workers_is_repeated(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"half": 2}], codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    start = tpu.run("tpu_vm.sh", "start", *CONFIG)
    assert start.returncode == 0 and "worker 0: already running\nworker 1: started" in start.stdout
    assert not (tpu.dir / "argv.0.2").exists()


def test_unanswered_questions_are_asked_again(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"deaf": 4}])
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "run", *CONFIG).returncode == 0


def test_an_expired_login_or_a_lost_network_is_waited_out(cloud: MakeCloud) -> None:
    expired = "ERROR: There was a problem refreshing your current auth tokens\nPlease run:\n gcloud auth login"
    tpu = cloud(lives=[{"offline": [2, 7, expired]}], codes="hang\n0")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    watch = subprocess.Popen(
        tpu.command("tpu_vm.sh", "watch", "--unreachable=0"), env=tpu.environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(tpu.find("worker.sh status")) >= 7)
    assert watch.poll() is None and tpu.run("tpu_vm.sh", "stop").returncode == 0
    assert watch.wait(60) == 77
    assert watch.stderr
    said = watch.stderr.read()
    assert said.count('run "gcloud auth login" on this machine') == 1 and "nothing is counted or deleted" in said


def test_a_key_that_left_the_agent_is_no_silent_slice(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"deaf": 5, "message": "ERROR: SSH Key is not present in the SSH agent."}])
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    run = tpu.run("tpu_vm.sh", "run", "--unreachable=0", *CONFIG)
    assert run.returncode == 0 and "ssh-add ~/.ssh/google_compute_engine" in run.stderr


def test_ssh_and_scp_end_by_themselves(cloud: MakeCloud) -> None:
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    limits = ("-oConnectTimeout=15", "-oServerAliveInterval=30", "-oServerAliveCountMax=4")
    for verb, flag in (("ssh", "--ssh-flag="), ("scp", "--scp-flag=")):
        calls = [call for call in tpu.calls if call[3] == verb]
        assert calls and all({flag + limit for limit in limits} <= set(call) for call in calls)


@pytest.mark.parametrize(
    ("life", "word"),
    [
        ({}, "healthy"),
        ({"waiting": ["WAITING_FOR_RESOURCES"]}, "waiting"),
        ({"waiting": ["SUSPENDED"]}, "lost"),
        ({"waiting": ["FAILED"]}, "lost"),
        ({"waiting": [""]}, "unknown"),
    ],
)
def test_health(cloud: MakeCloud, life: dict[str, object], word: str) -> None:
    tpu = cloud(lives=[life])
    assert tpu.run("tpu_vm.sh", "health").stdout == "lost\n"
    assert tpu.run("tpu_vm.sh", "create").returncode == 0
    assert tpu.run("tpu_vm.sh", "health").stdout == f"{word}\n"


def test_a_refusal_is_said_before_anything_is_asked_for(cloud: MakeCloud) -> None:
    tpu = cloud()
    (tpu.dir / "state.json").write_text('{"life": -1, "exists": false, "offline": [9, "ERROR: PERMISSION_DENIED: no"]}')
    up = tpu.run("tpu_vm.sh", "up")
    assert up.returncode == 69 and "PERMISSION_DENIED: no" in up.stderr and not tpu.find("create")
    assert tpu.run("tpu_vm.sh", "health").stdout == "refused\n"


def test_secrets_reach_the_program_and_nothing_else(cloud: MakeCloud) -> None:
    tpu = cloud()
    token = "hf_SENTINEL_0123456789"
    (tpu.dir / "secrets").mkdir()
    (tpu.dir / "secrets/my-token").write_text(token)
    words = ("--secret=HF_TOKEN=my-token", "--bucket=gs://bucket", *CONFIG)
    done = [
        tpu.run("tpu_vm.sh", command, *words, HF_TOKEN=token, WANDB_API_KEY=token) for command in ("up", "run", "logs")
    ]
    dry = [tpu.run("tpu_vm.sh", command, "--dry-run", *words, HF_TOKEN=token) for command in ("up", "run", "logs")]
    assert [each.returncode for each in (*done, *dry)] == [0] * 6, done[1].stderr
    assert tpu.env(0)["HF_TOKEN"] == tpu.env(1)["HF_TOKEN"] == token
    assert "WANDB_API_KEY" not in tpu.env(0)
    assert "reading HF_TOKEN from the secret my-token" in done[1].stdout
    assert not any(token in text for each in (*done, *dry) for text in (each.stdout, each.stderr))
    assert token not in tpu.everything_written()


def test_an_unreadable_secret_is_the_users_to_mend(cloud: MakeCloud) -> None:
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    run = tpu.run("tpu_vm.sh", "run", "--secret=HF_TOKEN=missing", *CONFIG)
    assert run.returncode == 1 and "roles/secretmanager.secretAccessor" in run.stdout
    assert not list(tpu.dir.glob("argv.*"))


@pytest.mark.parametrize("name", ["Upper", "1st", "under_score", "a b", "$(id)", "ends-", "x" * 62, "", "-a"])
def test_names_of_resources_are_checked_first(cloud: MakeCloud, name: str) -> None:
    tpu = cloud()
    done = tpu.run("tpu_vm.sh", "up", name=name)
    assert done.returncode == 64 and "is no resource name" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not tpu.calls


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--", "--config.rounds=2"], "say what to run after --"),
        (["run", *CONFIG, "--workdir=gs://elsewhere"], "give --workdir to the launcher"),
        (["run", *CONFIG, "--dry-run"], "write --dry-run before the --"),
        (["run", *CONFIG, "--process_id=3"], "is the launcher's business"),
        (["run", "--workdir=relative", *CONFIG], "is neither gs://BUCKET/FOLDER nor an absolute path"),
        (["run", "--bucket=", *CONFIG], "say where the run lives"),
        (["run", "--run-id=a/b", *CONFIG], "must be one name without slashes"),
        (["up", "--env=HF_TOKEN=abc", *CONFIG], "use --secret"),
        (["up", "--accelerator-type=a100-8"], "known are v5litepod-N"),
        (["up", "--accelerator-type=v6e"], "is not like v5litepod-16"),
        (["up", "--accelerator-type=v5litepod-5"], "come in 1, 4, 8, 16"),
        (["up", "--accelerator-type=v5p-12"], "is a multiple of 8"),
        (["up", "--poll=soon"], "is no number"),
        (["up", "--zone="], "--zone is missing"),
        (["up", "--flavour=x"], "unknown option --flavour"),
        (["up", "stray"], "comes after --"),
        (["fly"], "unknown command"),
        (["cost"], "--hours is missing"),
    ],
)
def test_wrong_options_are_one_sentence(cloud: MakeCloud, words: list[str], sentence: str) -> None:
    tpu = cloud()
    done = tpu.run("tpu_vm.sh", *words)
    assert done.returncode == 64 and sentence in done.stderr and "abc" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not tpu.calls


def test_dry_run_prints_commands_and_runs_none(cloud: MakeCloud) -> None:
    tpu = cloud()
    for command in (
        "create",
        "wait",
        "install",
        "start",
        "watch",
        "up",
        "run",
        "logs",
        "status",
        "health",
        "stop",
        "delete",
    ):
        done = tpu.run("tpu_vm.sh", command, "--dry-run", f"--run-id={HOSTILE}", *CONFIG)
        assert done.returncode == 0 and "gcloud compute tpus" in done.stdout, (command, done.stderr)
        printed = [line for line in done.stdout.splitlines() if not line.startswith("#")]
        check = subprocess.run(["bash", "-n"], input="\n".join(printed), text=True, capture_output=True)
        assert check.returncode == 0, check.stderr
    assert not tpu.calls and not list(tpu.dir.glob("selfplay_jax.*"))


def test_dry_run_is_what_would_be_run(cloud: MakeCloud) -> None:
    """The printed start command, run by a shell, is the recorded one to the letter."""
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    words = ("start", f"--run-id={HOSTILE}", *CONFIG)
    printed = tpu.run("tpu_vm.sh", words[0], "--dry-run", *words[1:]).stdout
    subprocess.run(["bash", "-c", printed], env=tpu.environment(), check=True, capture_output=True)
    assert tpu.run("tpu_vm.sh", *words).returncode == 0
    by_hand, by_launcher = tpu.find("worker.sh start")
    assert by_hand == by_launcher


def test_changes_of_the_checkout_are_installed(cloud: MakeCloud) -> None:
    tpu = cloud()
    (tpu.repo / "launch/README.md").write_text("changed\n")
    (tpu.repo / "launch/new.txt").write_text("untracked\n")
    up = tpu.run("tpu_vm.sh", "up")
    assert up.returncode == 0 and "files that git does not track stay here" in up.stderr
    tree = tpu.dir / "vms/w1/selfplay_jax"
    assert (tree / "launch/README.md").read_text() == "changed\n" and not (tree / "launch/new.txt").exists()
    assert tpu.run("tpu_vm.sh", "install", "--revision=HEAD").returncode == 0
    assert (tree / "launch/README.md").read_text() != "changed\n"


def test_an_installation_leaves_no_file_of_an_older_one_and_keeps_the_environment(cloud: MakeCloud) -> None:
    tpu = cloud()
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    tree = tpu.dir / "vms/w1/selfplay_jax"
    (tree / "launch/stale.py").write_text("")
    (tree / ".venv/kept").write_text("")
    assert tpu.run("tpu_vm.sh", "install").returncode == 0
    assert not (tree / "launch/stale.py").exists() and (tree / ".venv/kept").exists()


def test_nothing_is_installed_under_a_program_that_did_not_answer(cloud: MakeCloud) -> None:
    tpu = cloud(lives=[{"deaf": 2}], codes="hang")
    assert tpu.run("tpu_vm.sh", "up").returncode == 0
    assert tpu.run("tpu_vm.sh", "start", *CONFIG).returncode == 0
    tpu.await_program()
    install = tpu.run("tpu_vm.sh", "install")
    assert install.returncode == 69 and "the program runs here" in install.stderr
    assert (tpu.dir / "vms/w1/selfplay_jax/launch/worker.sh").exists()


def test_only_a_git_checkout_can_be_installed(cloud: MakeCloud) -> None:
    tpu = cloud()
    shutil.rmtree(tpu.repo / ".git")
    up = tpu.run("tpu_vm.sh", "up")
    assert up.returncode == 64 and "is no git checkout" in up.stderr and not tpu.calls


def test_cost(cloud: MakeCloud) -> None:
    done = cloud().run("tpu_vm.sh", "cost", "--accelerator-type=v5p-16", "--hours=10", "--price=4.2")
    assert done.stdout == "v5p-16: 8 chips x 10 hours x $4.2 = $336.00\n"
