"""What holds for all launchers."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from fake_cloud import ROOT, script

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
LAUNCHERS = [path for path in SCRIPTS if path.name in ("tpu_vm.sh", "babysit.sh", "local.sh", "sky.sh", "jobset.sh")]


def test_shellcheck() -> None:
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (it comes with the extra `test`)")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_help_names_every_option_and_command(path: pathlib.Path) -> None:
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and "usage: launch/" in done.stdout and "--dry-run" in done.stdout
    text = path.read_text()
    options = set(re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", text, re.MULTILINE)) - {"--"}
    assert options and {option for option in options if option not in done.stdout and option != "--help"} == set()
    assert "set -euo pipefail" in text or "set -Eeuo pipefail" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_of_macos(path: pathlib.Path) -> None:
    """bash 3.2 has none of these; worker.sh runs on Linux."""
    newer = (
        r"declare -A|local -A|\$\{\w+(,,|\^\^)|wait -n|mapfile|readarray|&>>|\|&|\$\{\w+@[QEPA]\}|\bcoproc\b|local -n"
    )
    if path.name != "worker.sh":
        assert not re.search(newer, re.sub(r"^\s*#.*", "", path.read_text(), flags=re.MULTILINE))
    assert path.stat().st_mode & 0o100 or "sourced" in path.read_text() or "sources this" in path.read_text()


def test_every_launcher_refuses_an_empty_command_line_kindly() -> None:
    for path in LAUNCHERS:
        done = subprocess.run([path], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
        if done.returncode == 0:
            assert "usage: launch/" in done.stdout, path.name
        else:
            assert done.returncode == 64 and "error: " in done.stderr.splitlines()[-1], path.name


@pytest.mark.parametrize(
    ("version_ok", "has_venv", "wanted", "python"),
    [
        (True, True, [], "/python3"),
        (True, False, ["sudo apt-get", "python3-venv"], "/python3"),
        (
            False,
            True,
            ["python3 -m pip -q install --user uv==", "python3 -m uv python install 3.12"],
            "/from/uv/python3.12",
        ),
    ],
)
def test_a_vm_gets_a_python_that_is_new_enough(
    tmp_path: pathlib.Path, version_ok: bool, has_venv: bool, wanted: list[str], python: str
) -> None:
    """worker.sh install, on a machine that has nothing but what is put here."""
    for name in ("bash", "sh", "dirname", "env", "sed"):
        found = shutil.which(name)
        assert found
        (tmp_path / name).symlink_to(found)
    for name in ("make", "sudo", "hostname"):
        script(tmp_path / name, f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/log\necho t1v-w-0\n')
    checks = f"""case "$*" in
      *ensurepip*) exit {0 if version_ok and has_venv else 1} ;;
      *version_info*) exit {0 if version_ok else 1} ;;
      *"uv python find"*) echo /from/uv/python3.12 ;;
    esac"""
    script(tmp_path / "python3", f'#!/bin/sh\necho "python3 $*" >>{tmp_path}/log\n{checks}\n')
    done = subprocess.run(
        [LAUNCH / "worker.sh", "install"], capture_output=True, text=True, env={"PATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    assert re.search(rf"^make -C .* setup TPU=1 PYTHON=\S*{re.escape(python)}$", log, re.MULTILINE), log
    assert all(words in log for words in wanted)
    assert ("sudo" in log) == ("sudo apt-get" in wanted)


README = (LAUNCH / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def as_dry_runs() -> list[str]:
    """The README's blocks, each command of a launcher as a dry run, all other programs as no-ops."""
    others = "".join(f"{name}() {{ :; }}\n" for name in ("gcloud", "kubectl", "xpk", "python", "pip", "sky", "mkdir"))
    blocks = [re.sub(r"^.*[a-z] \.\.\. .*$|^.* \.\.\.$", "", block, flags=re.MULTILINE) for block in BLOCKS]
    blocks = [
        re.sub(r"^(launch/(?:tpu_vm|sky)\.sh \w+|launch/\w+\.sh|\$gke [\w-]+)", r"\1 --dry-run", b, flags=re.M)
        for b in blocks
    ]
    return [others + block for block in blocks if re.search(r"--dry-run", block)]


@pytest.mark.parametrize("block", as_dry_runs(), ids=range(len(as_dry_runs())))
def test_commands_of_the_readme_are_accepted(block: str) -> None:
    env = {"PATH": "/usr/bin:/bin", "HF_TOKEN": "sentinel"}
    env |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z", "HOME": "/nonexistent"}
    done = subprocess.run(["bash", "-eu", "-c", block], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert "sentinel" not in done.stdout


def test_the_readme_names_every_launcher_and_exit_code() -> None:
    assert len(as_dry_runs()) >= 5
    assert all(path.name in README for path in LAUNCHERS)
    codes = re.search(r"^readonly (.*)$", (LAUNCH / "common.sh").read_text(), re.MULTILINE)
    assert codes and all(re.search(rf"\b{code}\b", README) for code in re.findall(r"=(\d+)", codes[1]))
