"""launch/skypilot.yaml and launch/sky.sh."""

import json
import pathlib
import subprocess

import pytest
import yaml
from fake_cloud import HOSTILE, ROOT, recorded, recording_stubs, script

SKY = str(ROOT / "launch/sky.sh")
TASK = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
CONFIG = ("--", "--config=configs/tpaw.py")


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> dict[str, str]:
    return recording_stubs(tmp_path, "sky")


def sky(stubs: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SKY, *words], capture_output=True, text=True, env=stubs, timeout=60)


def test_task() -> None:
    assert TASK["resources"]["use_spot"] is True
    assert TASK["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 76], "max_restarts_on_errors": 3}
    for part in ("setup", "run"):
        check = subprocess.run(["bash", "-n"], input=TASK[part], text=True, capture_output=True)
        assert check.returncode == 0, check.stderr


@pytest.mark.parametrize(("nodes", "gpus"), [(1, True), (3, True), (4, False)])
def test_from_the_command_line_to_the_program(
    stubs: dict[str, str], tmp_path: pathlib.Path, nodes: int, gpus: bool
) -> None:
    """sky.sh submits; the task's `run`, in a shell with the variables that sky sets, starts the program."""
    args = [f"--config.model.path={HOSTILE}\n$HOME", "", "*"]
    done = sky(
        stubs, "launch", "--name=demo", f"--run-id={HOSTILE}", "--bucket=gs://b", "--secret=HF_TOKEN", *CONFIG, *args
    )
    assert done.returncode == 0, done.stderr
    (call,) = recorded(stubs)
    assert call["argv"][:3] == ["jobs", "launch", "launch/skypilot.yaml"] and call["cwd"] == str(ROOT)
    words = call["argv"]
    assert words[words.index("--secret") + 1] == "HF_TOKEN"
    env = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--env")
    assert set(env) == {"RUN_ID", "BUCKET", "CONFIG", "ARGS"} == set(TASK["envs"])
    script(tmp_path / ".venv/bin/python", '#!/bin/sh\nprintf "%s\\0" "$@" >argv\nenv >env\nexit 75\n')
    if gpus:
        script(tmp_path / "gpu/nvidia-smi", "#!/bin/sh\n")
    env |= {"PATH": f"{tmp_path / 'gpu'}:/usr/bin:/bin", "HF_TOKEN": "", "SKYPILOT_NUM_NODES": str(nodes)}
    env |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3", "SKYPILOT_NODE_RANK": "2"}
    assert subprocess.run(["bash", "-c", TASK["run"]], env=env, cwd=tmp_path).returncode == 75
    got = (tmp_path / "argv").read_text().split("\0")[:-1]
    distributed = ["--coordinator=10.0.0.1:8476", "--num_processes=3", "--process_id=2"] if gpus and nodes > 1 else []
    assert got[2:] == [*CONFIG[1:], f"--workdir=gs://b/runs/{HOSTILE}", *args, *distributed]
    assert "HF_TOKEN" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize("command", ["launch", "status", "logs", "stop"])
def test_dry_run_prints_what_would_be_run(stubs: dict[str, str], command: str) -> None:
    words = (command, "--name=demo", f"--run-id={HOSTILE}", "--bucket=b", "--secret=HF_TOKEN", "--accelerators=H100:8")
    dry = sky(stubs, *words, "--num-nodes=2", "--on-demand", "--dry-run", *CONFIG)
    assert dry.returncode == 0 and not recorded(stubs), dry.stderr
    done = sky(stubs, *words, "--num-nodes=2", "--on-demand", *CONFIG)
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash", "-euc", dry.stdout], env=stubs, check=True, timeout=60, cwd=ROOT)
    by_launcher, by_hand = recorded(stubs)
    assert by_hand == by_launcher
    assert "sentinel" not in dry.stdout + dry.stderr + done.stdout + done.stderr + json.dumps(by_launcher)
    if command == "launch":
        assert {"--gpus=H100:8", "--num-nodes=2", "--no-use-spot"} <= set(by_launcher["argv"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch", "--name=a b", *CONFIG], "is no resource name"),
        (["launch", "--name=demo", *CONFIG], "say where the run lives"),
        (["launch", "--name=demo", "--bucket=b"], "say what to run after --"),
        (["launch", "--name=demo", "--secret=MISSING", *CONFIG], "this shell's environment has no MISSING"),
        (["launch", "--flavour=x", *CONFIG], "unknown option"),
        (["fly", "--name=demo"], "unknown command"),
    ],
)
def test_wrong_options_are_one_sentence(stubs: dict[str, str], words: list[str], sentence: str) -> None:
    done = sky(stubs, *words)
    assert done.returncode == 64 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not recorded(stubs)
